# SPDX-License-Identifier: Apache-2.0
"""Masked Softmax Loss for TRL: fine-tune an LLM to rank the items of a catalogue."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import the public names when one is first used, so that `trl-msl --help` need not wait for torch."""
    if name == "__all__" or not name.startswith("_"):
        api = import_module(".api", __name__)
        if name == "__all__" or name in api.__all__:
            return getattr(api, name)
        if name in globals():  # a room, imported by the line above
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
