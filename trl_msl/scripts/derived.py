# SPDX-License-Identifier: Apache-2.0
"""A model made from another one without training: its folder and its card."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import ModelCard

from ..recommender import find_base, name_base_absolutely
from ..training import NEVER_PUSHED
from .trained import copy_options


_OUTDATED = "*Measured before the catalogue was changed.*"


@contextmanager
def new_folder(output_dir: str) -> Iterator[Path]:
    """A temporary folder that becomes `output_dir`, which must not exist, once everything is written."""
    folder = Path(output_dir)
    if folder.exists():
        raise ValueError(f"`output_dir` = {output_dir!r} exists already: name another, or remove it.")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_model(source: Path, folder: Path) -> None:
    """
    Copy a model into a new folder, without checkpoints and without what was measured. An adapter names its base model
    so that it is found from there.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*NEVER_PUSHED, "base_model"))
    copy_options(source, folder)
    name_base_absolutely(folder, find_base(source))


def write_card(source: Path, folder: Path, model_id: str, note: str, has_changed: bool = False) -> None:
    """
    Adapt the model card of `source`, if it has one, and write it into `folder`.

    Args:
        source (`Path`):
            Folder of the model that this one was made from.
        folder (`Path`):
            Folder to write into.
        model_id (`str`):
            Repository or folder where the model will be.
        note (`str`):
            What was done. It follows the title, in place of an earlier note with the same first sentence.
        has_changed (`bool`, *optional*, defaults to `False`):
            Whether the metrics are out of date. They are then marked, and left out of the metadata.
    """
    path, name = source / "README.md", Path(model_id).name
    if not path.is_file():
        return
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    card.data.model_name = name
    body = re.sub(r"(?<=from_pretrained\()(['\"]).*?\1", lambda _: repr(model_id), card.text)
    body = re.sub(rf"^{re.escape(note.split('.')[0])}.*\n\n", "", body, flags=re.MULTILINE)
    body = re.sub(r"^# .*\n", lambda _: f"# Model Card for {name}\n\n{note}\n", body, count=1, flags=re.MULTILINE)
    if has_changed:
        card.data.eval_results = None
        if _OUTDATED not in body:
            body = re.sub(r"^## Evaluation.*\n", rf"\g<0>\n{_OUTDATED}\n", body, flags=re.MULTILINE)
    ModelCard(f"---\n{card.data.to_yaml()}\n---\n{body}", ignore_metadata_errors=True).save(folder / "README.md")
