# SPDX-License-Identifier: Apache-2.0
"""
Traditional recommenders on the rows that the LLM is trained and tested on. SASRec and BERT4Rec are those of
[RecTools](https://github.com/MTSWebServices/RecTools): `pip install "trl_msl[baselines]"`.

On the generated data of the quickstart, and on a folder of the MSL paper's authors:

```bash
trl-msl baselines --model sasrec-softmax --output_dir outputs/quickstart/sasrec-softmax
trl-msl baselines --config recipes/configs/baselines.yaml --model sasrec-sce \
    --data_dir data/Book --empty_texts keep --train_file train_10000.csv --output_dir outputs/book/sasrec-sce
```

Each training window is a separate sequence, in which SASRec predicts every item but the first; popularity and
item-kNN count an interaction once even if several windows of a user contain it. The epoch is chosen by NDCG@10 on the
validation windows. All items of the training windows are ranked, those of the history too; targets that are not among
them are cold, and count as misses, but for title-kNN and hybrid-kNN, which also rank new items, by their titles.
`output_dir` then holds `metrics.json`, `rankings.parquet`, and `scores_validation.parquet` and `scores_test.parquet`:
the best 200 items of each window and the model's scores, for `trl-msl fuse`; and of SASRec and BERT4Rec
`item_embeddings.safetensors`, for `trl-msl train --item_vectors`.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import set_seed

from ..collaborative import ItemNeighbours, add_titles, count_users, title_neighbours
from ..data import DataArguments, ItemCatalog, write_item_vectors
from ..evaluation import coverage, ranking_metrics, ranks_of_targets
from .command_line import command
from .loading import load_data
from .outputs import format_table, write_parquet, write_results


TOP_K, NUM_SCORED = 10, 200
LOSSES = {
    "sasrec-bce": "BCE",
    "sasrec-softmax": "softmax",
    "sasrec-sampled": "sampled_softmax",
    "sasrec-sce": "scaled_cross_entropy",
    "sasrec-dros": "BCE and DROS",
    "bert4rec": "softmax",
}
BY_TITLES = ["title-knn", "hybrid-knn"]
MODELS = ["popularity", "item-knn", *BY_TITLES, *LOSSES]
Scored = tuple[list[np.ndarray], list[np.ndarray]]  # items of each history, best first, and their scores
Scorer = Callable[[list[list[int]], int], Scored]  # histories, and how many items to score


@dataclass
class TransformerArguments:
    """
    Size and training of a transformer, by RecTools.

    Parameters:
        hidden_size (`int`, *optional*, defaults to `128`), num_layers, num_heads (`int`, *optional*, defaults to `2`):
            Size of the transformer.
        dropout, learning_rate (`float`, *optional*, defaults to `0.3` and `1e-3`):
            Dropout rate, and learning rate of Adam.
        batch_size, max_epochs (`int`, *optional*, defaults to `128` and `100`):
            Windows per step, and maximum number of passes over the training windows.
        patience (`int`, *optional*, defaults to `5`):
            Stop after this many epochs without a better validation NDCG@10.
        seed (`int`, *optional*, defaults to `0`):
            Random seed.
    """

    hidden_size: int = field(default=128, metadata={"help": "Width of the transformer."})
    num_layers: int = field(default=2, metadata={"help": "Layers of the transformer."})
    num_heads: int = field(default=2, metadata={"help": "Attention heads of each layer."})
    dropout: float = field(default=0.3, metadata={"help": "Dropout rate."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of Adam."})
    batch_size: int = field(default=128, metadata={"help": "Windows per step."})
    max_epochs: int = field(default=100, metadata={"help": "Maximum number of passes over the training windows."})
    patience: int = field(default=5, metadata={"help": "Stop after this many epochs without a better NDCG@10."})
    seed: int = field(default=0, metadata={"help": "Random seed."})

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "batch_size", "max_epochs", "patience", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be above 0.")
        if self.hidden_size < 1 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}: it must be a multiple of `num_heads`, {self.num_heads}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is {self.dropout}: it must be at least 0 and below 1.")


@dataclass
class BaselineArguments(TransformerArguments):
    """
    Arguments of this command, besides those of the data and of [`TransformerArguments`].

    Parameters:
        model (`str`, *optional*, defaults to `"sasrec-softmax"`):
            What to train: `popularity`; `item-knn`, by [`ItemNeighbours`]; `title-knn`, by [`title_neighbours`];
            `hybrid-knn`, by both, see [`add_titles`]; SASRec with binary cross-entropy (`sasrec-bce`), the softmax
            over all items (`sasrec-softmax`) or over the target and sampled items (`sasrec-sampled`),
            [`scaled_cross_entropy`] (`sasrec-sce`), or binary cross-entropy and [`robust_loss`] (`sasrec-dros`); or
            `bert4rec`, with the softmax over all items.
        output_dir (`str`, *optional*, defaults to `"outputs/baselines"`):
            Folder to write into.
        num_negatives (`int`, *optional*, defaults to `100`):
            Items sampled for each target, uniformly, by the losses that sample.
        sce_scale, mask_probability (`float`, *optional*, defaults to `100.0` and `0.5`):
            `scale` of [`scaled_cross_entropy`], and share of the items that BERT4Rec masks.
        dros_alpha, dros_beta (`float`, *optional*, defaults to `0.5` and `1.0`):
            Weight of [`robust_loss`], and its `beta`. Choose both on validation: the paper's code leaves the weight at
            0, and that of [DLLM2Rec](https://github.com/istarryn/DLLM2Rec) has 0.5 and 1.0 for SASRec.
        neighbours, shrinkage, decay (*optional*, defaults to `100`, `5**0.5` and `0.7`):
            `num_neighbours`, `shrinkage` and `decay` of [`ItemNeighbours`], for item-kNN, hybrid-kNN and (without
            shrinkage) title-kNN.
        title_weight, new_title_weight (`float`, *optional*, defaults to `0.2` and `0.8`):
            Weights of [`add_titles`], for hybrid-kNN.
    """

    model: str = field(default="sasrec-softmax", metadata={"help": "What to train.", "choices": MODELS})
    output_dir: str = field(default="outputs/baselines", metadata={"help": "Folder to write into."})
    num_negatives: int = field(default=100, metadata={"help": "Items sampled for each target."})
    sce_scale: float = field(default=100.0, metadata={"help": "Factor of the sampled sum in sasrec-sce."})
    dros_alpha: float = field(default=0.5, metadata={"help": "Weight of the robust loss in sasrec-dros."})
    dros_beta: float = field(default=1.0, metadata={"help": "How evenly errors count there."})
    mask_probability: float = field(default=0.5, metadata={"help": "Share of the items that BERT4Rec masks."})
    neighbours: int = field(default=100, metadata={"help": "Neighbours of each item in item-kNN."})
    shrinkage: float = field(default=5**0.5, metadata={"help": "How little rare items count in item-kNN."})
    decay: float = field(
        default=0.7, metadata={"help": "Weight of a history's item relative to the next, in item-kNN."}
    )
    title_weight: float = field(default=0.2, metadata={"help": "Weight of similar titles in hybrid-kNN."})
    new_title_weight: float = field(default=0.8, metadata={"help": "What to add to it for new items."})

    @property
    def loss(self) -> str:
        """RecTools' name of the loss."""
        return LOSSES[self.model]

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_negatives", "neighbours", "sce_scale", "dros_alpha", "dros_beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be above 0.")
        for name in ("title_weight", "new_title_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be a finite number, and at least 0.")
        if not 0 <= self.mask_probability < 1:
            raise ValueError(f"`mask_probability` is {self.mask_probability}: it must be at least 0 and below 1.")


def main(args: BaselineArguments, data_args: DataArguments) -> None:
    if (num_processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"`num_processes` is {num_processes}, but baselines train in one process: pass 1.")
    set_seed(args.seed)
    data = load_data(data_args)
    catalog, train_users = data.catalog, data.windows["train"]["user_id"]
    sequences = {split: [catalog.indices(ids) for ids in data.windows[split]["item_ids"]] for split in data.windows}
    histories = {split: [sequence[:-1] for sequence in sequences[split]] for split in sequences}
    targets = {split: [sequence[-1] for sequence in sequences[split]] for split in sequences}

    started = time.time()
    counts = count_users(sequences["train"], train_users, len(catalog)).numpy()
    popular = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]

    def rank(scored: Scored, split: str) -> tuple[np.ndarray, np.ndarray]:
        items = fill(scored[0], popular)
        return items, ranks_of_targets(items, targets[split])

    def validate(score: Scorer) -> float:
        ranks = rank(score(histories["validation"], TOP_K), "validation")[1]
        return ranking_metrics(ranks, (TOP_K,))["ndcg@10"]

    if args.model in LOSSES:
        from .sequence_models import item_embeddings, train_transformer

        score, chosen = train_transformer(args, sequences["train"], validate)
        known, embeddings = item_embeddings(score.args[0])
        ids = [catalog.ids[item] for item in known]
        write_item_vectors(Path(args.output_dir, "item_embeddings.safetensors"), embeddings, ids)
    else:
        if args.model == "popularity":
            score = partial(score_by_popularity, popular, counts)
        else:
            neighbours = fit_neighbours(args, sequences["train"], train_users, catalog, counts == 0)
            score = partial(score_by_neighbours, neighbours)
        chosen = {"validation_ndcg@10": validate(score), "epochs": 0, "num_parameters": 0}
    trained = time.time()
    scored = {"test": score(histories["test"], NUM_SCORED)}
    items, ranks = rank(scored["test"], "test")
    tested = time.time()
    scored["validation"] = score(histories["validation"], NUM_SCORED)
    for split, found in scored.items():
        write_scores(Path(args.output_dir, f"scores_{split}.parquet"), catalog, *found)
    metrics = {
        **ranking_metrics(ranks, (5, TOP_K), confidence=0.95, is_cold=counts[targets["test"]] == 0),
        "coverage": coverage(items, len(catalog)),
        "num_rows": len(ranks),
        **chosen,
        "train_seconds": round(trained - started, 1),
        "test_seconds": round(tested - trained, 1),
        "seed": args.seed,
        "arguments": {**dataclasses.asdict(args), **dataclasses.asdict(data_args)},
    }
    test_ids = [catalog.ids[item] for item in targets["test"]]
    write_results(Path(args.output_dir), metrics, catalog, test_ids, items, ranks, data.seen_items)
    misses = "" if args.model in BY_TITLES else f", which {args.model} can't rank"
    print(
        f"\nTest, {len(ranks)} users, {len(catalog)} items, {metrics['num_cold']} cold targets{misses}\n"
        f"{format_table({args.model: metrics})}\n\n{args.output_dir}/metrics.json, {tested - started:.0f} seconds"
    )


def fit_neighbours(
    args: BaselineArguments, windows: list[list[int]], users: list, catalog: ItemCatalog, is_new: np.ndarray
) -> ItemNeighbours:
    """The neighbours by users, by titles, or by both."""
    if args.model in BY_TITLES:
        titles = title_neighbours(catalog.texts, args.neighbours, args.decay)
        if args.model == "title-knn":
            return titles
    by_users = ItemNeighbours.fit(windows, users, len(catalog), args.neighbours, args.shrinkage, args.decay)
    if args.model == "item-knn":
        return by_users
    return add_titles(by_users, titles, torch.from_numpy(is_new), args.title_weight, args.new_title_weight)


def score_by_popularity(popular: np.ndarray, counts: np.ndarray, histories: list[list[int]], count: int) -> Scored:
    """The most popular items, and how many users have them."""
    items = popular[:count]
    return [items] * len(histories), [counts[items]] * len(histories)


def score_by_neighbours(neighbours: ItemNeighbours, histories: list[list[int]], count: int) -> Scored:
    """The items that have a score; of equal ones the first in the catalogue comes first."""
    bias = neighbours.score(histories)
    orders = [values.argsort(descending=True, stable=True)[:count] for values in bias.values]
    items, scores = ([row[order].numpy() for row, order in zip(rows, orders)] for rows in (bias.items, bias.values))
    return items, scores


def fill(ranked: list[np.ndarray], popular: np.ndarray) -> np.ndarray:
    """The first items of each row; where there are too few, the most popular other ones; then `-1`."""
    rest = [*popular[: 2 * TOP_K].tolist(), *range(-1, -TOP_K - 1, -1)]
    rows = [list(dict.fromkeys([*row[:TOP_K].tolist(), *rest]))[:TOP_K] for row in ranked]
    return np.maximum(rows, -1)


def write_scores(path: Path, catalog: ItemCatalog, items: list[np.ndarray], scores: list[np.ndarray]) -> None:
    """Write what a model alone says of each window: ids of items, best first, and their scores."""
    ids = [[catalog.ids[item] for item in row.tolist()] for row in items]
    write_parquet(path, pd.DataFrame({"item_ids": ids, "scores": [row.astype(float) for row in scores]}))


run = command(main)


if __name__ == "__main__":
    run()
