# SPDX-License-Identifier: Apache-2.0
"""Loading models and tokenizers from folders and repositories, whose files may come from anybody."""

from __future__ import annotations

import json
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from ..data import TASK_FILE, TASK_FILES
from ..trie import check_regular


# What transformers and the libraries below it raise for files that are damaged, foreign or missing
_UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError,
    UnpicklingError,
)  # fmt: skip


def find_folder(name: str | Path, argument: str, revision: str | None = None, **kwargs: Any) -> Path:
    """The folder itself, or that of a repository's snapshot."""
    if os.path.isdir(name):  # unlike `Path.is_dir`, also for names that no file system takes
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, **kwargs))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{argument}` = {str(name)!r} is not a folder, and can't be loaded from the Hub ({error})."
        ) from error


def find_task_folder(folder: Path, subfolder: str = "") -> Path:
    """Where the task of the model in `folder` is: there, or, for an adapter without one, beside its base model."""
    base = _base_of_adapter(folder / subfolder)
    if base is None or (folder / TASK_FILE).exists():
        return folder
    return find_folder(base, "base_model_name_or_path", allow_patterns=TASK_FILES)


def check_files(folder: Path, subfolder: str = "") -> None:
    """Raise a `ValueError` if loading the model would read a file that never ends, or weights outside its folder."""
    for place in {folder, folder / subfolder}:
        _check_files(place)
    base = _base_of_adapter(folder / subfolder)
    if base is not None and os.path.isdir(base):
        _check_files(Path(base))


def _check_files(folder: Path) -> None:
    for path in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")):
        if path.exists() and not path.is_dir():
            check_regular(path)
        if ".index." not in path.name or path.suffix != ".json":
            continue
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            outside = [name for name in names if name != Path(name).name]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
        if outside:
            raise ValueError(
                f"{path} names weights outside its folder, such as {outside[0][-200:]!r}, which are not read: put all "
                "weights beside it."
            )


def _base_of_adapter(folder: Path) -> str | None:
    """Folder or repository of the base model, if there is an adapter in the folder."""
    try:
        name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def load(auto_class: type, folder: Path, **kwargs: Any) -> Any:
    """Load a model or tokenizer; whatever transformers raises for damaged or foreign files becomes a `ValueError`."""
    try:
        return auto_class.from_pretrained(folder, **kwargs)
    except torch.OutOfMemoryError:  # a RuntimeError, but its files are fine
        raise
    except _UNREADABLE as error:
        raise ValueError(
            f"{auto_class.__name__} can't load {str(folder)!r} ({type(error).__name__}: {error}). Check that its "
            "files are complete and, for an adapter, that the base model is where adapter_config.json says."
        ) from error
