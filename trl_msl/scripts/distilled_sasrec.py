# SPDX-License-Identifier: Apache-2.0
"""What [`distill`] adds to RecTools' SASRec: titles in the item embeddings, and a teacher in the loss."""

from typing import Any, NamedTuple

import numpy as np
import torch
from rectools.dataset import Dataset
from rectools.dataset.features import DenseFeatures
from rectools.models.nn.item_net import IdEmbeddingsItemNet, ItemNetBase
from rectools.models.nn.transformers.lightning import TransformerLightningModule

from .distillation_loss import distillation_loss


class TeacherRankings(NamedTuple):
    """The arguments of [`student_options`]."""

    histories: list[list[int]]
    items: np.ndarray
    log_probs: np.ndarray


def student_options(
    histories: list[list[int]],
    items: np.ndarray,
    log_probs: np.ndarray,
    distillation_weight: float,
    weights: dict[str, float],
    embedding_weight: float,
) -> dict[str, Any]:
    """
    Options of RecTools' model that make it a student. Items are indices in the catalogue.

    Args:
        histories (`list[list[int]]`):
            Histories that the teacher has ranked, each once.
        items, log_probs (`np.ndarray` of shape `(num_histories, top_k)`, int64 and fp32):
            Its best items, best first, and their log-probabilities; -1 and `-inf` where there are fewer.
        distillation_weight (`float`), weights (`dict[str, float]`):
            Weight of [`distillation_loss`], and the weights in it.
        embedding_weight (`float`):
            That of [`TitleItemNet`]. Above 0, the model needs features from [`title_features`].
    """
    # RecTools writes the arguments of a module as JSON, which a teacher can't be: it belongs to the class
    teacher = TeacherRankings(histories, items, log_probs)
    options = {
        "loss": "distillation",
        "lightning_module_type": type("DistillationModule", (DistillationModule,), {"teacher": teacher}),
        "lightning_module_kwargs": {"distillation_weight": distillation_weight, "weights": weights},
    }
    if embedding_weight > 0:
        options["item_net_block_types"] = (IdEmbeddingsItemNet, TitleItemNet)
        options["item_net_constructor_kwargs"] = {"embedding_weight": embedding_weight}
    return options


class TitleItemNet(ItemNetBase):
    """
    A linear function of the language model's embeddings of the titles, times `embedding_weight`. RecTools adds it to
    the embeddings of the items, by which SASRec also scores them; in the paper's code it is added only to those of the
    history.

    The embeddings are centred, as a part that all titles have tells none apart, and scaled to length 1 on average, as
    a hidden state is a hundred times as long as an item's first embedding.
    """

    titles: torch.Tensor

    def __init__(self, titles: torch.Tensor, num_factors: int, embedding_weight: float):
        super().__init__()
        self.register_buffer("titles", titles, persistent=False)
        self.linear = torch.nn.Linear(titles.shape[1], num_factors, bias=False)
        self.embedding_weight = embedding_weight

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, n_factors: int, dropout_rate: float, embedding_weight: float, **kwargs: Any
    ) -> "TitleItemNet":
        titles = torch.as_tensor(dataset.item_features.values, dtype=torch.float32)
        return cls(titles, n_factors, embedding_weight)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        return self.embedding_weight * self.linear(self.titles[items.to(self.titles.device)])

    @property
    def out_dim(self) -> int:
        return self.linear.out_features


def title_features(embeddings: torch.Tensor) -> DenseFeatures:
    """Embeddings of shape `[num_items, hidden_size]` as [`TitleItemNet`] takes them."""
    centred = embeddings - embeddings.mean(dim=0)
    scale = centred.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    return DenseFeatures((centred / scale).numpy(), tuple(map(str, range(embeddings.shape[1]))))


class DistillationModule(TransformerLightningModule):
    """
    RecTools' training by the softmax over all items, to which [`distillation_loss`] is added for each window whose
    history the teacher has ranked. It is told the history by its items, and learns those that training windows hold.
    """

    teacher: TeacherRankings

    def __init__(self, *args: Any, distillation_weight: float, weights: dict[str, float], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.distillation_weight, self.weights = distillation_weight, weights
        self.first_item = len(self.item_extra_tokens)
        known = np.asarray(self.item_external_ids[self.first_item :], dtype=np.int64)
        size = max(known.max(), self.teacher.items.max(), *map(max, self.teacher.histories)) + 2
        places = np.full(size, -1)  # the last one is that of -1
        places[known] = np.arange(len(known))
        self.items = torch.from_numpy(places[self.teacher.items])
        self.log_probs = torch.from_numpy(self.teacher.log_probs).float()
        rows = enumerate((places[history] + self.first_item).tolist() for history in self.teacher.histories)
        self.rows = {tuple(history): row for row, history in rows}

    def _calc_custom_loss(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.torch_model(batch=batch)
        loss = self._calc_softmax_loss(logits, batch["y"], batch["yw"])
        histories = (tuple(item for item in row if item) for row in batch["x"].tolist())  # 0 is padding
        found = [(place, self.rows[history]) for place, history in enumerate(histories) if history in self.rows]
        if not found:
            return loss
        places, rows = torch.tensor(found).T
        scores, device = logits[places, -1, self.first_item :], logits.device
        losses = distillation_loss(
            scores, self.items[rows].to(device), self.log_probs[rows].to(device), **self.weights
        )
        # Of all windows, so that each of those with a teacher counts alike, however few they are
        return loss + self.distillation_weight * losses.sum() / len(logits)
