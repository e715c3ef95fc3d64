# SPDX-License-Identifier: Apache-2.0
"""What [`distill`] needs of the language model, each computed once and kept in files."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import RankingTask
from ..decoding import TrieDecoder, embed_texts, recommend
from ..trie import replacing
from .outputs import write_parquet
from .recommend import silent


class Teacher:
    """
    A trained language model, whose rankings are written in parts, so that a killed run resumes, and whoever asks for
    the same again reads them.

    Args:
        model ([`~transformers.PreTrainedModel`]), task ([`RankingTask`]):
            As for [`recommend`].
        folder (`Path`):
            Where the files are kept.
        top_k, max_expansions, batch_size (`int`):
            As for [`recommend`].
        part_size (`int`):
            Number of histories per part.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: RankingTask,
        folder: Path,
        top_k: int,
        max_expansions: int,
        batch_size: int,
        part_size: int,
    ):
        self.model, self.task, self.folder, self.top_k, self.part_size = model, task, folder, top_k, part_size
        decoder = TrieDecoder(model, task.trie)
        self.settings = {"decoder": decoder, "max_expansions": max_expansions, "batch_size": batch_size}
        if task.withdrawn:
            available = [i for i, item in enumerate(task.catalog.ids) if item not in task.withdrawn]
            self.settings["allowed"] = decoder.prepare_allowed(available)

    def rank(self, name: str, prompts: Sequence) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        """
        The best items of each prompt.

        Returns:
            Indices of the items and their log-probabilities, of shape `(num_prompts, top_k)`, -1 and `-inf` where
            there are fewer; and the table that `name-*.parquet` hold in parts.
        """
        parts = []
        with silent("trl_msl.decoding"):  # `exact` says in the table what it would warn of in each part
            for start in tqdm(range(0, len(prompts), self.part_size), desc=f"Teacher, {name}"):
                path, part = self.folder / f"{name}-{start:09}.parquet", prompts[start : start + self.part_size]
                # A part is written whole, but the last one has fewer rows if fewer were asked for
                if not path.exists() or len(pd.read_parquet(path)) < len(part):
                    write_parquet(path, self._search(part))
                parts.append(pd.read_parquet(path).iloc[: len(part)])
        table, catalog = pd.concat(parts, ignore_index=True), self.task.catalog
        items = np.full((len(prompts), self.top_k), -1)
        log_probs = np.full(items.shape, -np.inf, dtype=np.float32)
        for row, (ids, values) in enumerate(zip(table["item_ids"], table["log_probs"])):
            items[row, : len(ids)], log_probs[row, : len(ids)] = catalog.indices(ids), values
        return items, log_probs, table

    def _search(self, prompts: Sequence) -> pd.DataFrame:
        started = time.perf_counter()
        found = recommend(self.model, self.task, prompts, self.top_k, **self.settings)
        seconds = (time.perf_counter() - started) / len(prompts)
        rows = [row[row >= 0] for row in found.items]
        return pd.DataFrame(
            {
                "item_ids": [[self.task.catalog.ids[item] for item in row] for row in rows],
                "log_probs": [values[: len(row)] for row, values in zip(rows, found.scores)],
                "exact": found.exact,
                "seconds": seconds,
            }
        )

    def embed_titles(self) -> Tensor:
        """Last hidden state of the last token of each item's title: fp32 of shape `(num_items, hidden_size)`."""
        path = self.folder / "titles.safetensors"
        if not path.exists():
            texts = [text.strip() for text in self.task.catalog.texts]
            embeddings = embed_texts(self.model, self.task.tokenizer, texts, self.settings["batch_size"])
            with replacing(path) as temporary:
                save_file({"titles": embeddings.contiguous()}, temporary)
        return load_file(path)["titles"]
