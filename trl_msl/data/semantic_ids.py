# SPDX-License-Identifier: Apache-2.0
"""Semantic ids: items written as the codes of their vectors, by residual quantisation."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..trie import check_regular, replacing


QUANTIZER_FILE = "semantic_ids.safetensors"
_FORMAT = "1"
_MAX_LEVELS = 8
_MAX_COMPONENTS = 32  # with more, whitened, k-means finds less structure and fewer different codes
_CHUNK = 1024  # vectors whose distances to a codebook are in memory at a time


@dataclass(frozen=True, eq=False)
class SemanticIds:
    r"""
    Residual quantiser that turns vectors of items into semantic ids, such as `<a_12><b_7><c_201>`, as
    [TIGER](https://huggingface.co/papers/2305.05065) does, written like the index tokens of
    [LC-Rec](https://huggingface.co/papers/2311.09049). The first code is the nearest centroid of the first codebook,
    each further one that of what the codes before it leave over. Both papers train an RQ-VAE instead; here it is
    k-means at each level, on the vectors' principal components, with the same variance each and scaled to length 1. A
    language model's hidden states vary so much in a few directions that these would decide all codes.

    It is fitted once. A new item gets codes from the same codebooks, and all others keep theirs.

    Args:
        codebooks (`torch.Tensor` of shape `(num_levels, codebook_size, num_components)`, fp32):
            Centroids of each level.
        mean (`torch.Tensor` of shape `(dim,)`, fp32):
            What is subtracted from vectors.
        projection (`torch.Tensor` of shape `(dim, num_components)`, fp32):
            What they are then multiplied by.

    Raises:
        `ValueError`: if the tensors do not fit together, or are not finite.
    """

    codebooks: Tensor
    mean: Tensor
    projection: Tensor

    def __post_init__(self):
        shape = tuple(self.codebooks.shape)
        if len(shape) != 3 or not 1 <= shape[0] <= _MAX_LEVELS or 0 in shape:
            raise ValueError(f"`codebooks` has the shape {shape}: it must be (1 to {_MAX_LEVELS}, size, components).")
        dim = tuple(self.mean.shape)
        for name, expected in (("codebooks", shape), ("mean", dim[:1]), ("projection", (*dim, shape[2]))):
            tensor = getattr(self, name)
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != expected or not tensor.isfinite().all():
                raise ValueError(
                    f"`{name}` is {tensor.dtype}{list(tensor.shape)}: it must hold finite fp32 numbers, {expected}."
                )

    def __repr__(self) -> str:
        return f"SemanticIds(num_levels={self.num_levels}, codebook_size={self.codebook_size})"

    @property
    def num_levels(self) -> int:
        return self.codebooks.shape[0]

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @classmethod
    def fit(cls, vectors: Tensor, num_levels: int = 3, codebook_size: int = 256, seed: int = 0) -> SemanticIds:
        """
        Fit the codebooks with faiss's `ResidualQuantizer`. The same arguments give the same codebooks.

        Args:
            vectors (`torch.Tensor` of shape `(num_items, dim)`):
                A vector for each item.
            num_levels (`int`, *optional*, defaults to `3`):
                Number of codes of an item.
            codebook_size (`int`, *optional*, defaults to `256`):
                Number of centroids of each level: a power of two, at most the number of items.
            seed (`int`, *optional*, defaults to `0`):
                Seed of k-means.

        Raises:
            `ValueError`: if an argument is out of range, or faiss is not installed.
        """
        if vectors.ndim != 2 or not vectors.isfinite().all():
            raise ValueError(f"`vectors` has the shape {tuple(vectors.shape)}: pass finite numbers, (num_items, dim).")
        cls.check_options(len(vectors), num_levels, codebook_size)
        import faiss

        vectors = vectors.float().cpu()
        mean, projection = _whitening(vectors)
        quantizer = faiss.ResidualQuantizer(projection.shape[1], num_levels, codebook_size.bit_length() - 1)
        quantizer.train_type = faiss.ResidualQuantizer.Train_default
        quantizer.max_beam_size = 1  # residuals of the nearest centroid, as in `encode`
        quantizer.cp.seed = seed
        quantizer.cp.min_points_per_centroid = 1  # else a warning for each k-means of a small catalogue
        quantizer.train(_project(vectors, mean, projection).numpy())
        codebooks = faiss.vector_to_array(quantizer.codebooks).reshape(num_levels, codebook_size, -1)
        return cls(torch.from_numpy(codebooks.copy()), mean, projection)

    @staticmethod
    def check_options(num_items: int, num_levels: int, codebook_size: int) -> None:
        """Raise what [`SemanticIds.fit`] would for these options, before the vectors are made."""
        if not 1 <= num_levels <= _MAX_LEVELS:
            raise ValueError(f"`num_levels` is {num_levels}: it must lie between 1 and {_MAX_LEVELS}.")
        if codebook_size & (codebook_size - 1) or not 2 <= codebook_size <= num_items:
            raise ValueError(
                f"`codebook_size` is {codebook_size}: it must be a power of two, from 2 to the number of items, "
                f"{num_items}."
            )
        try:
            import faiss  # noqa: F401
        except ImportError as error:
            raise ValueError(f'Semantic ids need faiss ({error}): pip install "trl_msl[semantic]".') from error

    def encode(self, vectors: Tensor) -> Tensor:
        """
        Codes of vectors, `(num_vectors, dim)`: int64 of shape `(num_vectors, num_levels)`. A vector's codes do not
        depend on the others.

        Raises:
            `ValueError`: if vectors have another size than those that the quantiser was fitted to.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean):
            raise ValueError(
                f"`vectors` has the shape {tuple(vectors.shape)}, but the quantiser was fitted to vectors of "
                f"{len(self.mean)} numbers: pass vectors from the same source."
            )
        codes = torch.empty(len(vectors), self.num_levels, dtype=torch.int64)
        for rows in torch.arange(len(vectors)).split(_CHUNK):
            residual = _project(vectors[rows].float().cpu(), self.mean, self.projection)
            for level, centroids in enumerate(self.codebooks):
                # By a matrix product a distance would depend on the size of the batch
                distances = torch.cdist(residual, centroids, compute_mode="donot_use_mm_for_euclid_dist")
                codes[rows, level] = distances.argmin(dim=1)
                residual = residual - centroids[codes[rows, level]]
        return codes

    # ------------------------------------------------------------------ as text

    @property
    def tokens(self) -> list[str]:
        """All tokens that ids consist of: those of each level, and those that tell items with the same codes apart."""
        return [_token(level, code) for level in range(self.num_levels + 1) for code in range(self.codebook_size)]

    def write(self, codes: Tensor, taken: Iterable[str] = ()) -> list[str]:
        """
        The texts of items with some codes, `(num_items, num_levels)`. Of items with the same codes, all but the first
        get a further token, as in TIGER: `<a_12><b_7><c_201><d_0>`. Where these are used up, items share the last.

        Args:
            codes (`torch.Tensor` of shape `(num_items, num_levels)`):
                What [`SemanticIds.encode`] returned.
            taken (`Iterable[str]`, *optional*):
                Texts of the items that there are already.

        Example:

        ```python
        >>> import torch
        >>> from trl_msl.data import SemanticIds

        >>> quantizer = SemanticIds(torch.zeros(2, 4, 8), torch.zeros(8), torch.eye(8))
        >>> quantizer.write(torch.tensor([[3, 0], [3, 0], [1, 2]]), taken=["<a_1><b_2>"])
        ['<a_3><b_0>', '<a_3><b_0><c_0>', '<a_1><b_2><c_0>']

        ```
        """
        counts = Counter("".join(re.findall(r"<[a-z]_\d+>", text)[: self.num_levels]) for text in taken)
        texts = []
        for row in codes.tolist():
            text = "".join(_token(level, code) for level, code in enumerate(row))
            count, counts[text] = counts[text], counts[text] + 1
            texts.append(text + _token(self.num_levels, min(count, self.codebook_size) - 1) if count else text)
        return texts

    def has_written(self, text: str) -> bool:
        """Whether a text has the form of [`SemanticIds.write`]'s."""
        *codes, further = (_token(level, r"\d+") for level in range(self.num_levels + 1))
        return re.fullmatch(f"{''.join(codes)}({further})?", text) is not None

    # ------------------------------------------------------------------ storage

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `semantic_ids.safetensors` with a checksum into a folder, whole or not at all."""
        header = {"format": _FORMAT, "sha256": self.fingerprint()}
        with replacing(Path(save_directory) / QUANTIZER_FILE) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in vars(self).items()}, temporary, header)

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> SemanticIds:
        """
        Read what [`SemanticIds.save_pretrained`] wrote.

        Raises:
            `ValueError`: if the file is missing or damaged.
        """
        path = Path(save_directory) / QUANTIZER_FILE
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                found = cls(*(file.get_tensor(name) for name in ("codebooks", "mean", "projection")))
            if header.get("format") != _FORMAT:
                raise ValueError(f"its format is {header.get('format')}, this version reads {_FORMAT}")
            if header.get("sha256") != found.fingerprint():
                raise ValueError("its checksum differs")
        except (OSError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"`save_directory` = {str(save_directory)!r} does not hold a readable {QUANTIZER_FILE} ({error}): "
                "name the folder that `trl-msl semantic-ids` wrote, or write it again."
            ) from error
        return found

    def fingerprint(self) -> str:
        """SHA-256 of everything that the codes depend on."""
        digest = hashlib.sha256(json.dumps(list(self.codebooks.shape)).encode())
        for tensor in (self.codebooks, self.mean, self.projection):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def _whitening(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of vectors, and the projection onto their principal components, with variance 1 each."""
    mean = vectors.mean(dim=0)
    centred = vectors - mean
    variances, axes = torch.linalg.eigh((centred.T @ centred).double() / len(vectors))  # ascending
    kept = variances[-_MAX_COMPONENTS:] > 1e-6 * variances[-1]
    if not kept.any():
        raise ValueError("`vectors` are all the same: pass vectors that tell items apart.")
    return mean, (axes[:, -_MAX_COMPONENTS:] / variances[-_MAX_COMPONENTS:].sqrt())[:, kept].float()


def _project(vectors: Tensor, mean: Tensor, projection: Tensor) -> Tensor:
    # In fp64, so that after rounding it does not depend on the size of the batch
    projected = (vectors - mean).double() @ projection.double()
    return torch.nn.functional.normalize(projected, dim=1).float()


def _token(level: int, code: int | str) -> str:
    return f"<{chr(ord('a') + level)}_{code}>"
