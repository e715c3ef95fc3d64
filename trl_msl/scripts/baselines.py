# SPDX-License-Identifier: Apache-2.0
"""
Traditional recommenders on the rows that the LLM is trained and tested on, by
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
them are cold, and count as misses. `output_dir` then holds `metrics.json` and `rankings.parquet`.
"""

import copy
import dataclasses
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import set_seed

from ..data import DataArguments
from ..evaluation import coverage, ranking_metrics, ranks_of_targets
from .command_line import command
from .loading import load_data
from .outputs import format_table, write_results


try:
    from implicit.nearest_neighbours import CosineRecommender, NearestNeighboursScorer
    from rectools.dataset import Dataset, IdMap, Interactions
    from rectools.models import BERT4RecModel, ImplicitItemKNNWrapperModel, PopularModel, SASRecModel
    from rectools.models.base import ModelBase
    from rectools.models.nn.transformers.lightning import TransformerLightningModule
    from scipy import sparse
except ImportError as error:
    raise ImportError(f'baselines need RecTools ({error}): pip install "trl_msl[baselines]".') from error


TOP_K = 10
LOSSES = {
    "sasrec-bce": "BCE",
    "sasrec-softmax": "softmax",
    "sasrec-sampled": "sampled_softmax",
    "sasrec-sce": "scaled_cross_entropy",
    "bert4rec": "softmax",
}
MODELS = ["popularity", "item-knn", *LOSSES]


@dataclass
class BaselineArguments:
    """
    Arguments of this command, besides those of the data.

    Parameters:
        model (`str`, *optional*, defaults to `"sasrec-softmax"`):
            What to train: `popularity`; `item-knn`, by cosine; SASRec with binary cross-entropy (`sasrec-bce`), the
            softmax over all items (`sasrec-softmax`) or over the target and sampled items (`sasrec-sampled`), or
            [`scaled_cross_entropy`] (`sasrec-sce`); or `bert4rec`, with the softmax over all items.
        output_dir (`str`, *optional*, defaults to `"outputs/baselines"`):
            Folder to write into.
        hidden_size (`int`, *optional*, defaults to `128`), num_layers, num_heads (`int`, *optional*, defaults to `2`):
            Size of the transformer.
        dropout, learning_rate (`float`, *optional*, defaults to `0.3` and `1e-3`):
            Dropout rate, and learning rate of Adam.
        batch_size, max_epochs (`int`, *optional*, defaults to `128` and `100`):
            Windows per step, and maximum number of passes over the training windows.
        patience (`int`, *optional*, defaults to `5`):
            Stop after this many epochs without a better validation NDCG@10.
        num_negatives (`int`, *optional*, defaults to `100`):
            Items sampled for each target, uniformly, by the losses that sample.
        sce_scale, mask_probability (`float`, *optional*, defaults to `100.0` and `0.5`):
            `scale` of [`scaled_cross_entropy`], and share of the items that BERT4Rec masks.
        neighbours (`int`, *optional*, defaults to `20`):
            Neighbours of each item in item-kNN.
        seed (`int`, *optional*, defaults to `0`):
            Random seed.
    """

    model: str = field(default="sasrec-softmax", metadata={"help": "What to train.", "choices": MODELS})
    output_dir: str = field(default="outputs/baselines", metadata={"help": "Folder to write into."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the transformer."})
    num_layers: int = field(default=2, metadata={"help": "Layers of the transformer."})
    num_heads: int = field(default=2, metadata={"help": "Attention heads of each layer."})
    dropout: float = field(default=0.3, metadata={"help": "Dropout rate."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of Adam."})
    batch_size: int = field(default=128, metadata={"help": "Windows per step."})
    max_epochs: int = field(default=100, metadata={"help": "Maximum number of passes over the training windows."})
    patience: int = field(default=5, metadata={"help": "Stop after this many epochs without a better NDCG@10."})
    num_negatives: int = field(default=100, metadata={"help": "Items sampled for each target."})
    sce_scale: float = field(default=100.0, metadata={"help": "Factor of the sampled sum in sasrec-sce."})
    mask_probability: float = field(default=0.5, metadata={"help": "Share of the items that BERT4Rec masks."})
    neighbours: int = field(default=20, metadata={"help": "Neighbours of each item in item-kNN."})
    seed: int = field(default=0, metadata={"help": "Random seed."})

    def __post_init__(self):
        whole = ("num_layers", "num_heads", "batch_size", "max_epochs", "patience", "num_negatives", "neighbours")
        for name in (*whole, "sce_scale", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be above 0.")
        if self.hidden_size < 1 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}: it must be a multiple of `num_heads`, {self.num_heads}."
            )
        for name in ("dropout", "mask_probability"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be at least 0 and below 1.")


def main(args: BaselineArguments, data_args: DataArguments) -> None:
    if (num_processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"`num_processes` is {num_processes}, but baselines train in one process: pass 1.")
    set_seed(args.seed)
    data = load_data(data_args)
    catalog, train_users = data.catalog, data.windows["train"]["user_id"]
    sequences = {split: [catalog.indices(ids) for ids in data.windows[split]["item_ids"]] for split in data.windows}
    targets = {split: [sequence[-1] for sequence in sequences[split]] for split in sequences}

    started = time.time()
    counted = make_dataset(sequences["train"], train_users, once=True)
    popular = PopularModel().fit(counted).recommend(counted.user_id_map.external_ids[:1], counted, TOP_K, False)

    def rank(model: ModelBase | None, split: str) -> tuple[np.ndarray, np.ndarray]:
        histories = [sequence[:-1] for sequence in sequences[split]]
        items = rank_items(model, histories, counted.item_id_map, popular["item_id"].tolist())
        return items, ranks_of_targets(items, targets[split])

    def validate(model: ModelBase | None) -> float:
        return ranking_metrics(rank(model, "validation")[1], (TOP_K,))["ndcg@10"]

    if args.model in LOSSES:
        # As for the LLM, each window is a row of its own, even if a user has several
        train = make_dataset(sequences["train"], range(len(train_users)))
        model, chosen = train_transformer(args, train, max(map(len, sequences["train"])), validate)
    else:
        knn = ItemKNN(args.neighbours + 1, num_threads=1)  # each item is its own nearest neighbour
        model = ImplicitItemKNNWrapperModel(knn).fit(counted) if args.model == "item-knn" else None
        chosen = {"validation_ndcg@10": validate(model), "epochs": 0, "num_parameters": 0}
    trained = time.time()
    items, ranks = rank(model, "test")
    tested = time.time()
    metrics = {
        **ranking_metrics(ranks, (5, TOP_K), confidence=0.95),
        "coverage": coverage(items, len(catalog)),
        "num_rows": len(ranks),
        **chosen,
        "train_seconds": round(trained - started, 1),
        "test_seconds": round(tested - trained, 1),
        "seed": args.seed,
        "arguments": {**dataclasses.asdict(args), **dataclasses.asdict(data_args)},
    }
    test_ids, seen = [ids[-1] for ids in data.windows["test"]["item_ids"]], data.seen_items
    write_results(Path(args.output_dir), metrics, catalog, test_ids, items, ranks, seen)
    num_cold = sum(item not in seen for item in test_ids)
    print(f"\nTest, {len(ranks)} users, {len(catalog)} items, {num_cold} cold targets, which these models can't rank")
    print(f"{format_table({args.model: metrics})}\n\n{args.output_dir}/metrics.json, {tested - started:.0f} seconds")


def make_dataset(
    sequences: list[list[int]], users: Sequence[Any], items: IdMap | None = None, once: bool = False
) -> Dataset:
    """
    RecTools' dataset of sequences of items (indices in the catalogue, in time order) and the user of each. `items`
    leaves all others out; `once` counts each item of a user once.
    """
    frame = pd.DataFrame({"user_id": list(users), "item_id": sequences}).explode("item_id", ignore_index=True)
    frame = frame.astype({"item_id": int}).assign(weight=1, datetime=pd.to_datetime(frame.index))
    if once:
        frame = frame.drop_duplicates(["user_id", "item_id"])
    if items is None:
        return Dataset.construct(frame)
    frame = frame[frame["item_id"].isin(items.external_ids)]
    user_ids = IdMap.from_values(frame["user_id"])
    return Dataset(user_ids, items, Interactions.from_raw(frame, user_ids, items))


def rank_items(model: ModelBase | None, histories: list[list[int]], items: IdMap, popular: list[int]) -> np.ndarray:
    """
    The best items for each history, as indices in the catalogue: those that `model` finds, which are none if it knows
    no item of the history; then the most popular ones; then `-1`.
    """
    ranked = [[] for _ in histories]
    dataset = make_dataset(histories, range(len(histories)), items)
    if model is not None and dataset.user_id_map.size:
        users = dataset.user_id_map.external_ids
        for user, item in model.recommend(users, dataset, TOP_K, filter_viewed=False)[["user_id", "item_id"]].values:
            ranked[user].append(item)
    ranked = [list(dict.fromkeys([*row, *popular, *range(-1, -TOP_K, -1)]))[:TOP_K] for row in ranked]
    return np.maximum(ranked, -1)


def train_transformer(
    args: BaselineArguments, train: Dataset, longest: int, validate: Callable[[ModelBase], float]
) -> tuple[ModelBase, dict[str, float]]:
    """The model of the epoch that `validate` rates highest, and that rating, the epoch, and the model's size."""
    for name in ("pytorch_lightning", "lightning_fabric"):  # Lightning reports each `fit`, here once per epoch
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|rectools|pydantic")
    settings = {
        "n_factors": args.hidden_size,
        "n_blocks": args.num_layers,
        "n_heads": args.num_heads,
        "dropout_rate": args.dropout,
        "lr": args.learning_rate,
        "batch_size": args.batch_size,
        "loss": LOSSES[args.model],
        "n_negatives": args.num_negatives,
    }
    options = {
        "bert4rec": {"mask_prob": args.mask_probability},
        "sasrec-sce": {
            "lightning_module_type": ScaledCrossEntropyModule,
            "lightning_module_kwargs": {"scale": args.sce_scale},
        },
    }
    # In BERT4Rec the mask takes the last place; SASRec's inputs are all items but the last
    model_class, length = (BERT4RecModel, longest) if args.model == "bert4rec" else (SASRecModel, longest - 1)
    model = model_class(session_max_len=length, **settings, **options.get(args.model, {}))
    best = {"validation_ndcg@10": -math.inf}
    for epoch in range(1, args.max_epochs + 1):
        model.fit_partial(train, min_epochs=1, max_epochs=1)
        loss = model.fit_trainer.callback_metrics["train_loss"].item()
        if not math.isfinite(loss):  # also if BERT4Rec masks no item of a batch
            raise ValueError(
                f"the loss is {loss} in epoch {epoch}: lower `learning_rate`, which is {args.learning_rate}, or raise "
                f"`batch_size`, which is {args.batch_size}."
            )
        ndcg = validate(model)
        print(f"epoch {epoch}: loss {loss:.4f}, validation NDCG@10 {ndcg:.4f}", flush=True)
        if ndcg > best["validation_ndcg@10"]:
            best = {"validation_ndcg@10": ndcg, "epochs": epoch}
            weights = copy.deepcopy(model.torch_model.state_dict())
        elif epoch - best["epochs"] >= args.patience:
            break
    model.torch_model.load_state_dict(weights)
    return model, {**best, "num_parameters": sum(weight.numel() for weight in model.torch_model.parameters())}


def scaled_cross_entropy(positive: torch.Tensor, negatives: torch.Tensor, scale: float) -> torch.Tensor:
    r"""
    Softmax loss over the target and sampled items, whose sum is scaled up as if there were more of them,
    \\( -\log \frac{e^{s_+}}{e^{s_+} + \alpha \sum_j e^{s_j}} \\): the *scaled* cross-entropy of
    [Xu et al.](https://huggingface.co/papers/2408.14238), not the *scalable* one of
    [Mezentsev et al.](https://huggingface.co/papers/2409.18721).

    Args:
        positive (`torch.Tensor` of shape `[...]`), negatives (`torch.Tensor` of shape `[..., num_negatives]`):
            Scores of the targets and of the sampled items.
        scale (`float`):
            Factor \\( \alpha \\) of their sum.

    Returns:
        `torch.Tensor` of shape `[...]`: the loss of each target.
    """
    sampled = negatives.logsumexp(dim=-1) + math.log(scale)
    return torch.nn.functional.softplus(sampled - positive)


class ScaledCrossEntropyModule(TransformerLightningModule):
    """RecTools' training with [`scaled_cross_entropy`]."""

    def __init__(self, *args: Any, scale: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.scale = scale

    @staticmethod
    def requires_negatives(loss: str) -> bool:
        return True

    def get_loss_calculator(self) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        def mean_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            losses = scaled_cross_entropy(logits[..., 0], logits[..., 1:], self.scale)
            return (losses * weights)[targets != 0].mean()  # 0 is padding

        return mean_loss


class ItemKNN(CosineRecommender):
    """Item-kNN in which no item is its own neighbour, as the history would otherwise rank first."""

    def fit(self, *args: Any, **kwargs: Any) -> None:
        super().fit(*args, **kwargs)
        self.similarity = (self.similarity - sparse.diags(self.similarity.diagonal())).tocsr()
        self.scorer = NearestNeighboursScorer(self.similarity)


run = command(main)


if __name__ == "__main__":
    run()
