# SPDX-License-Identifier: Apache-2.0
"""Catalogues to measure on: the real Book titles where they are at hand, and token sequences that resemble them."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from trl_msl import ItemCatalog, ItemTrie, PromptTemplate, RankingTask, build_rows, read_windows
from trl_msl.data import encode_items


SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCAB_SIZE = 128_256  # of Llama 3
END_TOKEN = VOCAB_SIZE - 1  # of generated sequences


@dataclass(frozen=True)
class Catalog:
    """
    Args:
        source (`str`):
            Where the items come from.
        trie (`ItemTrie`):
            Their trie.
        targets (`torch.Tensor` of shape `(num_targets,)`, int64):
            Index of the item that each training row has as its target.
    """

    source: str
    trie: ItemTrie
    targets: Tensor

    def paths(self, num_rows: int, seed: int) -> Tensor:
        """
        Nodes of the titles of random targets.

        Returns:
            `torch.Tensor` of shape `(num_rows, longest)`, int64, padded with `-1` on the right.
        """
        chosen = torch.randint(len(self.targets), (num_rows,), generator=torch.Generator().manual_seed(seed))
        return self.trie.paths(self.trie.item_nodes[self.targets[chosen]])


def load_books() -> Catalog:
    """Book titles and training targets of the MSL paper with Llama 3's tokenizer; generated ones where absent."""
    data, tokenizer = SHARED / "data" / "amazon_books", SHARED / "tokenizers" / "llama3"
    if not (data.is_dir() and tokenizer.is_dir()):
        trie = ItemTrie.from_sequences(generate_sequences(6_344, 12), VOCAB_SIZE)
        return Catalog("generated: 6,344 random items of 12 tokens", trie, torch.arange(trie.num_items))
    logging.getLogger("trl_msl").setLevel(logging.ERROR)  # it would report the empty and repeated titles
    catalog = ItemCatalog.from_json(data / "id2name4Rec.json", template='"{text}"', empty_texts="keep")
    windows = read_windows(data, train_file="train_10000.csv")["train"]
    targets = torch.tensor(catalog.indices(ids[-1] for ids in windows["item_ids"]))
    trie = catalog.build_trie(AutoTokenizer.from_pretrained(tokenizer))
    return Catalog("Amazon Book titles, Llama 3 tokenizer", trie, targets)


def load_titles() -> dict[str, list[list[int]]]:
    """Token sequences of the MSL paper's catalogues, Llama 3's tokenizer, by name; none where they are absent."""
    tokenizer = SHARED / "tokenizers" / "llama3"
    folders = {name: SHARED / "data" / f"amazon_{name}" for name in ("books", "office")}
    if not all(folder.is_dir() for folder in (tokenizer, *folders.values())):
        return {}
    logging.getLogger("trl_msl").setLevel(logging.ERROR)
    encode = AutoTokenizer.from_pretrained(tokenizer)
    items = {name: folder / "id2name4Rec.json" for name, folder in folders.items()}
    catalogs = {
        name: ItemCatalog.from_json(path, template='"{text}"', empty_texts="keep") for name, path in items.items()
    }
    return {name: encode_items(encode, catalog.completions) for name, catalog in catalogs.items()}


def load_prompts(num_users: int) -> list[list[int]]:
    """Token ids of the MSL paper's prompts (Table 1) for the first users of the test set; random ones where absent."""
    data, tokenizer = SHARED / "data" / "amazon_books", SHARED / "tokenizers" / "llama3"
    if not (data.is_dir() and tokenizer.is_dir()):
        tokens = torch.randint(VOCAB_SIZE, (num_users, 160), generator=torch.Generator().manual_seed(0))
        tokens[:, :40] = tokens[0, :40]  # an instruction
        return tokens.tolist()
    catalog = ItemCatalog.from_json(data / "id2name4Rec.json", template='"{text}"', empty_texts="keep")
    template = PromptTemplate.from_paper("book", "books", "read")
    task = RankingTask(catalog, AutoTokenizer.from_pretrained(tokenizer), template)
    windows = read_windows(data)["test"].select(range(num_users))
    return task.encode_prompts(build_rows(windows, task)["prompt"][:])


def generate_sequences(num_items: int, length: int, seed: int = 0) -> np.ndarray:
    """
    Random token sequences that share prefixes as titles do, in random order.

    The next token depends on the last one: it is that token's k-th most likely successor with a probability that falls
    as `k ** -1.3` (a Zipf law). The exponent is such that 6,344 sequences of 12 tokens branch 2.85 times each on
    average and have 10.3 nodes per item; the 6,344 Book titles branch 2.83 times and have 11.0 nodes per item.

    Returns:
        `numpy.ndarray` of shape `(num_items, length)`, int64: the last token is the end token.
    """
    rng = np.random.default_rng(seed)
    tokens = np.full((num_items, length), END_TOKEN, dtype=np.int64)
    last = np.zeros(num_items, dtype=np.int64)
    for position in range(length - 1):
        successor = np.minimum(rng.zipf(1.3, num_items), VOCAB_SIZE) - 1
        # Any mapping will do that gives each token at each position successors of its own
        last = (last * 48_271 + successor * 7_919 + position * 104_729) % END_TOKEN
        tokens[:, position] = last
    return tokens
