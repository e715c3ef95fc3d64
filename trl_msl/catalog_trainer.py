# SPDX-License-Identifier: Apache-2.0
"""What the trainers of this package share: a catalogue that is saved beside the model, and runs that survive."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import get_config_model_id

from .bundle import Bundle
from .catalog import ItemCatalog
from .model_card import describe_recommender
from .prompts import PromptTemplate
from .trie import ItemTrie


logger = logging.getLogger(__name__)


class CatalogTrainerMixin:
    """For a [`~transformers.Trainer`] of TRL, which stands after it among the bases."""

    def _set_catalog(
        self, trie: ItemTrie, prompt_template: PromptTemplate | None, catalog: ItemCatalog | None
    ) -> None:
        """Take over a trainer's arguments, to be called before its `__init__`."""
        if not isinstance(trie, ItemTrie):
            raise ValueError(f"`trie` is a {type(trie).__name__}: pass `catalog.build_trie(tokenizer)`.")
        if trie.first_branching_node < 0:
            raise ValueError(f"`trie` holds a single sequence ({trie}), so there is nothing to learn from it.")
        if catalog is not None and prompt_template is None:
            raise ValueError("`catalog` is saved to be used with the model, which also needs the `prompt_template`.")
        if catalog is not None and len(catalog) != trie.num_items:
            raise ValueError(f"`catalog` ({catalog}) is not what `trie` ({trie}) was built from.")
        self.trie = trie
        self.prompt_template = prompt_template
        self.catalog = catalog

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """
        As [`~transformers.Trainer.train`]; `resume_from_checkpoint=True` takes the last checkpoint in `output_dir`
        that was written to its end, so that a run may be killed at any moment.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.catalog is not None and self.args.should_save:  # with DeepSpeed and FSDP all ranks come here
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            self.bundle.save_pretrained(output_dir or self.args.output_dir, tokenizer)

    @property
    def bundle(self) -> Bundle:
        """What is saved beside the model."""
        args = self.args
        return Bundle(self.catalog, self.trie, self.prompt_template, args.max_length, args.chat_template_kwargs)

    def predict(self, *args, **kwargs):
        raise ValueError("`predict` is not supported, as full logits are never built: rank items with `recommend`.")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.catalog is None or not self.is_world_process_zero():
            return
        evaluations = [entry for entry in self.state.log_history if any("@" in name for name in entry)]
        best = [entry for entry in evaluations if entry["step"] == self.state.best_global_step]
        metrics = (best or evaluations or [{}])[-1]
        num_rows = len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None
        path = Path(self.args.output_dir) / "README.md"
        card = ModelCard.load(path)
        introduction, _, rest = card.text.partition("## Quick start")  # TRL's, for a model that chats
        procedure = rest[rest.index("## Training procedure") :]
        # TRL's template has no word for a base model that is not on the Hub
        base = f"`{get_config_model_id(self.model.config)}`"
        introduction = introduction.replace("[None](https://huggingface.co/None)", base)
        model_id = self.hub_model_id or str(self.args.output_dir)
        card.text = introduction + describe_recommender(model_id, self.bundle, num_rows, metrics) + procedure
        card.save(path)


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """
    Folder of the last checkpoint whose `trainer_state.json`, which is written last, is whole.

    Raises:
        `ValueError`: if there is none.
    """
    steps = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
        except (OSError, TypeError, ValueError):
            logger.warning("%s was not written to its end: it is left out.", path)
        else:
            steps[state.global_step] = path
    if not steps:
        raise ValueError(f"`resume_from_checkpoint`: {str(output_dir)!r} has no checkpoint written to its end.")
    return str(steps[max(steps)])
