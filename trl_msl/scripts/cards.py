# SPDX-License-Identifier: Apache-2.0
"""The card of a model that was made from another one without training."""

import re
from pathlib import Path

from huggingface_hub import ModelCard


_WITHOUT_CARD = """\
# Model Card

A recommender made with [TRL](https://github.com/huggingface/trl) and `trl_msl`.

## Quick start

```python
from trl_msl import Recommender

recommender = Recommender.from_pretrained("")
```
"""
_OUTDATED = "*Measured before the catalogue was changed.*"


def write_card(source: Path, folder: Path, model_id: str, note: str, has_changed: bool = False) -> None:
    """
    Write `README.md` into a folder.

    Args:
        source (`Path`):
            Folder of the model that it was made from, whose card is followed if there is one.
        folder (`Path`):
            Folder to write into.
        model_id (`str`):
            Repository or folder where the model will be.
        note (`str`):
            What was done, after the title; it replaces an earlier note that begins with the same three words.
        has_changed (`bool`, *optional*, defaults to `False`):
            Whether the metrics may be others now. They are then marked, and left out of the metadata.
    """
    path, name = source / "README.md", Path(model_id).name
    text = path.read_text(encoding="utf-8") if path.is_file() else _WITHOUT_CARD
    card = ModelCard(text, ignore_metadata_errors=True)
    if has_changed:
        card.data.eval_results = None
    card.data.model_name = name
    body = re.sub(r"(?<=from_pretrained\()(['\"]).*?\1", lambda _: repr(model_id), card.text)
    start = re.escape(" ".join(note.split()[:3]))
    body = re.sub(rf"^{start}.*\n\n", "", body, flags=re.MULTILINE)
    body = re.sub(r"^# .*\n", lambda _: f"# Model Card for {name}\n\n{note}\n", body, count=1, flags=re.MULTILINE)
    if has_changed and _OUTDATED not in body:
        body = re.sub(r"^## Evaluation.*\n", rf"\g<0>\n{_OUTDATED}\n", body, flags=re.MULTILINE)
    ModelCard(f"---\n{card.data.to_yaml()}\n---\n{body}", ignore_metadata_errors=True).save(folder / "README.md")
