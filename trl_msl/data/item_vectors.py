# SPDX-License-Identifier: Apache-2.0
"""Tables of item vectors, such as the item embeddings of a collaborative model: written, and read for a catalogue."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..trie import check_regular, replacing
from .catalog import ItemCatalog


logger = logging.getLogger(__name__)


def write_item_vectors(path: Path, vectors: Tensor, ids: Sequence[str]) -> None:
    """Write vectors, `(num_items, dim)`, and the ids of their items to a safetensors file."""
    with replacing(path) as temporary:
        save_file({"vectors": vectors.detach().float().contiguous()}, temporary, {"item_ids": json.dumps(list(ids))})


def read_item_vectors(path: str | Path, catalog: ItemCatalog) -> Tensor:
    """
    Read one vector for each item of a catalogue.

    Args:
        path (`str` or `Path`):
            Safetensors file with a tensor `vectors`, or a single one of any name, of shape `(num_items, dim)`: of the
            items that the file's metadata lists as `item_ids` (a JSON list), or else of the catalogue's, in its order.
        catalog ([`ItemCatalog`]):
            The items. Those without a vector get the mean of all.

    Returns:
        `torch.Tensor` of shape `(len(catalog), dim)`, fp32, on the CPU.

    Raises:
        `ValueError`: if the file can't be read, holds something else, or has none of the catalogue's items.
    """
    try:
        check_regular(Path(path))
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if "vectors" not in names and len(names) != 1:
                raise ValueError(f"it has the tensors {names[:5]}: name one of them `vectors`")
            vectors = file.get_tensor("vectors" if "vectors" in names else names[0])
            ids = json.loads((file.metadata() or {}).get("item_ids", "null"))
        ids = catalog.ids if ids is None else [str(item) for item in ids]
        if vectors.ndim != 2 or not vectors.is_floating_point() or not vectors.isfinite().all():
            raise ValueError(f"its tensor is {vectors.dtype} of shape {tuple(vectors.shape)}, or not finite")
        if len(vectors) != len(ids):
            raise ValueError(f"it has {len(vectors)} vectors for {len(ids)} items")
        if len(set(ids)) != len(ids):
            raise ValueError("some of its `item_ids` are there twice")
        known = {item: row for row, item in enumerate(ids) if item in catalog.index_of_id}
        if not known:
            raise ValueError(f"none of its items, such as {ids[:3]}, is in the catalogue")
    except (OSError, TypeError, ValueError, IndexError, RuntimeError, SafetensorError) as error:  # fp8 has no isfinite
        raise ValueError(
            f"`item_vectors` = {str(path)!r} can't be used ({error}): pass a safetensors file with a tensor "
            "(num_items, dim), such as `trl-msl baselines` writes for the same items."
        ) from error
    vectors = vectors.float()[list(known.values())]
    table = vectors.mean(dim=0).repeat(len(catalog), 1)
    table[torch.tensor(catalog.indices(known))] = vectors
    if len(known) < len(catalog):
        logger.info("%d of %d items have no vector, and get the mean.", len(catalog) - len(known), len(catalog))
    return table
