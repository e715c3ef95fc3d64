# SPDX-License-Identifier: Apache-2.0
"""Pushing to the Hub: no user data, and no adapter whose base model is on this machine only."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from transformers.utils.hub import hf_api
from trl.trainer.utils import get_config_model_id


logger = logging.getLogger(__name__)

# What commands write beside a model or in folders below it: evaluations, histories of users, where the data lies
NEVER_PUSHED = (
    "rankings.parquet", "recommendations.txt", "metrics.json", "log_history.json", "training.png", "probe.json",
    "data.json", "base_model/*", "checkpoint-*",
)  # fmt: skip


@contextlib.contextmanager
def skipping_private_files() -> Iterator[None]:
    """Keep [`NEVER_PUSHED`] out of what `Trainer` uploads: it has no option for this."""
    api = hf_api()
    upload_folder, private = api.upload_folder, [pattern for name in NEVER_PUSHED for pattern in (name, f"*/{name}")]

    def upload_less(*args: Any, ignore_patterns: list[str] | None = None, **kwargs: Any) -> Any:
        return upload_folder(*args, ignore_patterns=[*(ignore_patterns or []), *private], **kwargs)

    api.upload_folder = upload_less
    try:
        yield
    finally:
        api.upload_folder = upload_folder


def check_base(model: str | PreTrainedModel, peft_config: Any, output_dir: str, is_pushed: bool) -> None:
    """
    Warn of an adapter on a local base model, as it can't be loaded elsewhere.

    Raises:
        `ValueError`: if it is to be pushed.
    """
    if peft_config is None and (isinstance(model, str) or not is_peft_model(model)):
        return
    base = model if isinstance(model, str) else get_config_model_id(model.config)
    if not base or not Path(base).is_dir():
        return
    remedy = "Merge it first (`trl-msl merge`) and share the result, or train on a base model from the Hub."
    if is_pushed:
        raise ValueError(
            f"`push_to_hub`: the adapter's base model is the local folder {base!r}, which nobody else has. {remedy}"
        )
    folder = Path(output_dir).resolve()
    is_made_for_this_run = Path(base).resolve() in (folder / "base_model", folder.parent / "base_model")
    if not is_made_for_this_run:
        logger.warning(
            "The adapter can't be loaded elsewhere: its base model is the local folder %s. %s", base, remedy
        )


def name_bases_absolutely(model: PreTrainedModel) -> None:
    """Let an adapter name its local base model so that it is found from every folder."""
    for config in model.peft_config.values() if is_peft_model(model) else ():
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())
