# SPDX-License-Identifier: Apache-2.0
"""SASRec and BERT4Rec for [`baselines`], by [RecTools](https://github.com/MTSWebServices/RecTools)."""

import copy
import logging
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch


try:
    from rectools.dataset import Dataset, IdMap, Interactions
    from rectools.dataset.features import DenseFeatures
    from rectools.models import BERT4RecModel, SASRecModel
    from rectools.models.base import ModelBase
    from rectools.models.nn.transformers.lightning import TransformerLightningModule
except ImportError as error:
    raise ImportError(f'SASRec and BERT4Rec need RecTools ({error}): pip install "trl_msl[baselines]".') from error


def make_dataset(sequences: list[list[int]], items: IdMap | None = None) -> Dataset:
    """
    RecTools' dataset of sequences of items (indices in the catalogue, in time order), each of another user: as for the
    LLM, each window is a row of its own. `items` leaves all others out.
    """
    frame = pd.DataFrame({"user_id": range(len(sequences)), "item_id": sequences})
    frame = frame.explode("item_id", ignore_index=True)
    frame = frame.astype({"item_id": int}).assign(weight=1, datetime=pd.to_datetime(frame.index))
    if items is None:
        return Dataset.construct(frame)
    frame = frame[frame["item_id"].isin(items.external_ids)]
    user_ids = IdMap.from_values(frame["user_id"])
    return Dataset(user_ids, items, Interactions.from_raw(frame, user_ids, items))


def score_items(
    model: ModelBase, items: IdMap, histories: list[list[int]], count: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """
    The best `count` items for each history, as indices in the catalogue, and their scores: none where `model` knows no
    item of the history.
    """
    dataset = make_dataset(histories, items)
    users = dataset.user_id_map.external_ids
    if len(users) == 0:
        return [np.empty(0, dtype=int)] * len(histories), [np.empty(0)] * len(histories)
    found = model.recommend(users, dataset, count, filter_viewed=False).sort_values(["user_id", "rank"])
    ends = np.searchsorted(found["user_id"], np.arange(1, len(histories)))
    return np.split(found["item_id"].to_numpy(), ends), np.split(found["score"].to_numpy(), ends)


def item_embeddings(model: ModelBase) -> tuple[np.ndarray, torch.Tensor]:
    """The items that a model knows, as indices in the catalogue, and their embeddings, `(num_known, n_factors)`."""
    known = model.data_preparator.get_known_item_ids()
    with torch.no_grad():
        return known, model.torch_model.item_model.get_all_embeddings()[-len(known) :].cpu()  # padding comes first


def train_transformer(
    args: Any,
    sequences: list[list[int]],
    validate: Callable[[Callable], float],
    features: DenseFeatures | None = None,
    **further: Any,
) -> tuple[Callable, dict[str, float]]:
    """
    Train by the command's `args`, with `features` of all items and `further` options of RecTools' model, if there are
    any. Returns a function that scores items by the model of the epoch that `validate` rates highest; and that rating,
    the epoch, and the model's size.
    """
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
        "loss": args.loss,
        "n_negatives": args.num_negatives,
    }
    options = {
        "bert4rec": {"mask_prob": args.mask_probability},
        "sasrec-sce": {
            "lightning_module_type": ScaledCrossEntropyModule,
            "lightning_module_kwargs": {"scale": args.sce_scale},
        },
        "sasrec-dros": {
            "lightning_module_type": RobustModule,
            "lightning_module_kwargs": {"alpha": args.dros_alpha, "beta": args.dros_beta},
        },
    }
    longest = max(map(len, sequences))
    # In BERT4Rec the mask takes the last place; SASRec's inputs are all items but the last
    model_class, length = (BERT4RecModel, longest) if args.model == "bert4rec" else (SASRecModel, longest - 1)
    train = make_dataset(sequences)
    if features is not None:
        known = features.take(train.item_id_map.external_ids.astype(int))
        train = Dataset(train.user_id_map, train.item_id_map, train.interactions, item_features=known)
    model = model_class(session_max_len=length, **settings | options.get(args.model, {}) | further)
    score, best = partial(score_items, model, train.item_id_map), {"validation_ndcg@10": -math.inf}
    for epoch in range(1, args.max_epochs + 1):
        model.fit_partial(train, min_epochs=1, max_epochs=1)
        loss = model.fit_trainer.callback_metrics["train_loss"].item()
        if not math.isfinite(loss):  # also if BERT4Rec masks no item of a batch
            raise ValueError(
                f"the loss is {loss} in epoch {epoch}: lower `learning_rate`, which is {args.learning_rate}, or raise "
                f"`batch_size`, which is {args.batch_size}."
            )
        ndcg = validate(score)
        print(f"epoch {epoch}: loss {loss:.4f}, validation NDCG@10 {ndcg:.4f}", flush=True)
        if ndcg > best["validation_ndcg@10"]:
            best = {"validation_ndcg@10": ndcg, "epochs": epoch}
            weights = copy.deepcopy(model.torch_model.state_dict())
        elif epoch - best["epochs"] >= args.patience:
            break
    model.torch_model.load_state_dict(weights)
    return score, {**best, "num_parameters": sum(weight.numel() for weight in model.torch_model.parameters())}


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


def robust_loss(scores: torch.Tensor, targets: torch.Tensor, propensity: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    What DROS ([Yang et al., SIGIR 2023](https://github.com/YangZhengyi98/DROS)) adds to a loss against shifts of the
    distribution of items: with \\( y_j \\) 1 for the target and 0 for all other items,
    \\( \log \sum_j \exp(p_j (s_j - y_j)^2 / \beta) \\), a soft maximum of the items' squared errors.

    Args:
        scores (`torch.Tensor` of shape `[num_targets, num_items]`), targets (`torch.Tensor` of shape `[num_targets]`):
            Scores of all items for each target, and the target's index.
        propensity (`torch.Tensor` of shape `[num_items]`):
            Weight \\( p \\) of each item's error: see [`item_propensity`].
        beta (`float`):
            \\( \beta \\): the smaller it is, the more the largest error counts.

    Returns:
        `torch.Tensor` of shape `[num_targets]`.
    """
    errors = scores - torch.nn.functional.one_hot(targets, scores.shape[-1])
    return (propensity * errors**2 / beta).logsumexp(dim=-1)


def item_propensity(counts: np.ndarray) -> torch.Tensor:
    """Each item's share of all `counts`, each raised by 1, to the power of 0.05 as in the paper's code; fp32."""
    counts = torch.from_numpy(counts).double() + 1
    return (counts / counts.sum()).pow(0.05).float()


class RobustModule(TransformerLightningModule):
    """
    RecTools' training by binary cross-entropy with sampled items, to which `alpha` times [`robust_loss`] is added.
    Items are counted at all places of the training windows, in the paper's code only where they are targets. That code
    samples one item for each target, and has only the last item of a window as a target.
    """

    propensity: torch.Tensor

    def __init__(self, *args: Any, alpha: float, beta: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.alpha, self.beta, self.first_item = alpha, beta, len(self.item_extra_tokens)
        items = self.data_preparator.train_dataset.interactions.df["item_id"]
        counts = np.bincount(items, minlength=len(self.item_external_ids))[self.first_item :]
        self.register_buffer("propensity", item_propensity(counts), persistent=False)

    @staticmethod
    def requires_negatives(loss: str) -> bool:
        return True

    def _calc_custom_loss(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits, targets = self.torch_model(batch=batch), batch["y"]
        sampled = torch.cat([targets.unsqueeze(-1), batch["negatives"]], dim=-1)
        loss = self._calc_bce_loss(logits.gather(-1, sampled), targets, batch["yw"])
        is_target = targets != 0  # 0 is padding
        scores, targets = logits[is_target][:, self.first_item :], targets[is_target] - self.first_item
        return loss + self.alpha * robust_loss(scores, targets, self.propensity, self.beta).mean()
