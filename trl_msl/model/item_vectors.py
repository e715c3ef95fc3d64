# SPDX-License-Identifier: Apache-2.0
"""Vectors of items as input embeddings, by a trained projector."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..trie import FIRST_VECTOR_TOKEN, check_regular, replacing
from .head import unbound_forward


ITEM_VECTORS_FILE = "item_vectors.safetensors"


class ItemVectors(nn.Module):
    r"""
    Input embeddings of *vector tokens*, the ids from `FIRST_VECTOR_TOKEN` on, one for each item: a frozen vector of
    the item, such as its embedding in SASRec, through a projector that is trained, \\( W_2 \, \mathrm{GELU}(W_1 v +
    b_1) + b_2 \\), as in [LLaRA](https://huggingface.co/papers/2312.02445). An item without a vector has the mean of
    all.

    The model's `state_dict` leaves them out, so that its files are those of any other model, whole or an adapter:
    [`save_item_vectors`] writes them beside it.

    Args:
        vectors (`torch.Tensor` of shape `(num_items, dim)`):
            Vectors of the items, in the catalogue's order.
        hidden_size (`int`):
            Size of the model's embeddings, and of the projector's hidden layer.

    Raises:
        `ValueError`: if `vectors` is not a matrix of finite numbers.
    """

    def __init__(self, vectors: Tensor, hidden_size: int):
        super().__init__()
        if vectors.ndim != 2 or 0 in vectors.shape or not vectors.is_floating_point() or not vectors.isfinite().all():
            raise ValueError(
                f"`vectors` is {vectors.dtype} of shape {tuple(vectors.shape)}: pass finite floats, (num_items, dim)."
            )
        vectors = vectors.detach().float()
        self.register_buffer("table", torch.cat([vectors, vectors.mean(dim=0, keepdim=True)]))
        # Not modules of their own, which adapters of all linear layers would take
        first, second = nn.Linear(vectors.shape[1], hidden_size), nn.Linear(hidden_size, hidden_size)
        self.first_weight, self.first_bias = first.weight, first.bias
        self.second_weight, self.second_bias = second.weight, second.bias

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings `(num_tokens, hidden_size)` of vector tokens `(num_tokens,)`."""
        last = len(self.table) - 1  # for items that came after the training
        vectors = self.table[(tokens.to(self.table.device) - FIRST_VECTOR_TOKEN).clamp(max=last)]
        hidden = nn.functional.gelu(nn.functional.linear(vectors, self.first_weight, self.first_bias))
        return nn.functional.linear(hidden, self.second_weight, self.second_bias)

    @torch.no_grad()
    def scale(self, target: float) -> None:
        """Scale the projector so that vectors of any size give embeddings with the standard deviation `target`."""
        self.first_weight /= self.table.std().clamp(min=1e-6)
        self.second_bias.zero_()
        tokens = FIRST_VECTOR_TOKEN + torch.arange(min(len(self.table), 1000), device=self.table.device)
        self.second_weight *= target / self(tokens).std().clamp(min=1e-6)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as it is saved: `vectors`, and the projector's weights."""
        return {"vectors": self.table[:-1], **{name: weight.detach() for name, weight in self.named_parameters()}}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what [`tensors`] returned."""
        vectors = tensors["vectors"]
        self.table.copy_(torch.cat([vectors, vectors.mean(dim=0, keepdim=True)]))
        for name, weight in self.named_parameters():
            weight.copy_(tensors[name])

    def fingerprint(self, names: tuple[str, ...] | None = None) -> str:
        """SHA-256 of all tensors, or of some."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors().items():
            if names is None or name in names:
                digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _apply(self, fn: Callable, recurse: bool = True) -> ItemVectors:
        """Moved with the model, but exact also in a model that is cast to bf16."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    # They are in a file of their own

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        pass

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        pass


def add_item_vectors(model: PreTrainedModel, vectors: Tensor | ItemVectors) -> ItemVectors:
    """
    Let a model read vector tokens in its prompts. All else about it stays: with other tokens it gives the same logits,
    and its head has no vector tokens, so that it can never write one. With PEFT, call this on the adapted model, since
    adding an adapter freezes all other parameters.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to change.
        vectors (`torch.Tensor` of shape `(num_items, dim)` or [`ItemVectors`]):
            Vectors for a new projector, or another model's, to be shared.

    Returns:
        [`ItemVectors`]: to be trained, with `requires_grad`; in fp32 on the device of the model's embeddings.

    Raises:
        `ValueError`: if `vectors` is not a matrix of finite numbers, or the model's input embeddings are not an
            `nn.Embedding`, as where an adapter is on them.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"`model` has {type(embedding).__name__} as its input embeddings, but item vectors need an `nn.Embedding`"
            ": leave the embeddings out of `target_modules`, `modules_to_save` and `trainable_token_indices`."
        )
    if isinstance(vectors, ItemVectors):
        embedding.item_vectors = vectors
    else:
        device = embedding.weight.device
        module = ItemVectors(vectors, embedding.embedding_dim).to(device)
        with torch.no_grad():
            module.scale(embedding(torch.arange(min(1000, embedding.num_embeddings), device=device)).float().std())
        embedding.item_vectors = module
    embedding.forward = types.MethodType(_with_vectors(unbound_forward(embedding)), embedding)
    return embedding.item_vectors


def _with_vectors(original_forward: Callable) -> Callable:
    def forward(self, input: Tensor) -> Tensor:
        is_vector = input >= FIRST_VECTOR_TOKEN
        hidden = original_forward(self, input.masked_fill(is_vector, 0))
        # Also without any, so that DDP always finds a gradient
        vectors = self.item_vectors(input[is_vector])
        return hidden.masked_scatter(is_vector[..., None].to(hidden.device), vectors.to(hidden))

    return forward


def get_item_vectors(model: PreTrainedModel) -> ItemVectors | None:
    """What [`add_item_vectors`] has added to a model, if anything."""
    return getattr(model.get_input_embeddings(), "item_vectors", None)


def save_item_vectors(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's vectors and projector into its folder, in place of those that were there."""
    path, found = folder / ITEM_VECTORS_FILE, get_item_vectors(model)
    if found is None:  # left by a model that was saved there before
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in found.tensors().items()}, temporary)


def load_item_vectors(model: PreTrainedModel, folder: Path) -> ItemVectors | None:
    """
    Give a model the vectors and the projector that were saved in a folder, or those in place of its own, if there are
    any. All of it is as it was saved, bit for bit.

    Raises:
        `ValueError`: if the file is damaged or foreign, or of a model of another size.
    """
    path = folder / ITEM_VECTORS_FILE
    if not path.exists():
        return None
    try:
        check_regular(path)
        tensors = load_file(path)
        expected = ItemVectors(tensors["vectors"], model.get_input_embeddings().embedding_dim).tensors()
        shapes, others = ({name: (t.dtype, t.shape) for name, t in part.items()} for part in (expected, tensors))
        if shapes != others or not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"it holds {others} for embeddings of {model.get_input_embeddings().embedding_dim}")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{path} does not hold item vectors of this model ({error}): restore it, or train again."
        ) from error
    found = get_item_vectors(model) or add_item_vectors(model, tensors["vectors"])
    found.load(tensors)
    return found
