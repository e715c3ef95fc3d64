# SPDX-License-Identifier: Apache-2.0
"""Which models can run a tree of tokens in one forward pass, found by trying a small one."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from ..trie import CompressedTrie, ItemTrie
from .head import backbone, head_projection
from .tree_cache import TreeCache, prefill_prefix


USE_GENERATE = "decode with `model.generate` and `TrieLogitsProcessor` instead (`recommend(..., mode='generate')`)"


def check_length(backbone: PreTrainedModel, prompt_length: int, item_length: int) -> None:
    """Raise a `ValueError` if the longest prompt and item exceed some layer's window or the model's positions."""
    lengths = f"`prompts` of up to {prompt_length} tokens with an item of up to {item_length}"
    window = sliding_window(backbone.config.get_text_config())
    if window is not None and prompt_length + item_length > window:
        raise ValueError(
            f"{lengths} don't fit the model's sliding window of {window}: shorten the prompts, or {USE_GENERATE}."
        )
    limit = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    tables = {module for module in backbone.modules() if isinstance(module, nn.Embedding)}
    tables.discard(backbone.get_input_embeddings())
    # Learned positions are a table of their own; OPT's has two rows more
    is_learned = any(limit is not None and table.num_embeddings in (limit, limit + 2) for table in tables)
    if is_learned and prompt_length + item_length > limit:
        raise ValueError(f"{lengths} exceed the model's {limit} positions: shorten the prompts.")


def sliding_window(config: PretrainedConfig) -> int | None:
    """The smallest window of any layer, in tokens; `None` if no layer has one."""
    layer_types = getattr(config, "layer_types", None)
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    if layer_types is None and getattr(config, "use_sliding_window", True):
        layer_types = ["sliding_attention"]
    sizes = [getattr(config, name, None) for kind, name in windows.items() if kind in (layer_types or [])]
    return min((size for size in sizes if size is not None), default=None)


def is_sharded(model: PreTrainedModel) -> bool:
    """
    Whether each process holds only a part of the model's weights (FSDP2, ZeRO-3). Such a model can be trained but not
    decoded with, since each process searches at its own pace.
    """
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def check_whole(model: PreTrainedModel) -> None:
    """Raise a `ValueError` if `model` is sharded."""
    if is_sharded(model):
        raise ValueError(
            f"`model`, a {type(model).__name__}, is sharded over processes, each of which decodes at its own pace: "
            "save it and decode with the whole model (`trl-msl evaluate`)."
        )


def check_tree_attention(model: PreTrainedModel) -> None:
    """
    Run a small tree through the model and compare some of its logits with those of its paths.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, not PEFT-wrapped, that has passed [`check_head`].

    Raises:
        `ValueError`: if they differ, or the model can't run a tree at all.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"`model` uses {config._attn_implementation!r} attention, which does not accept a tree mask: call "
            f"`model.set_attn_implementation('sdpa')` if the model allows it, or {USE_GENERATE}."
        )
    check_whole(model)
    # GPT-Neo treats slots of the cache as positions
    if "local" in getattr(config, "attention_layers", []):
        raise ValueError(f"`model`, a {name}, has local attention, which can't use a tree mask: {USE_GENERATE}.")
    try:
        error = _compare_tree(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as exception:
        raise ValueError(
            f"`model`, a {name}, can't run a tree of tokens ({exception!r}): {USE_GENERATE}."
        ) from exception
    if error > 0:
        raise ValueError(
            f"`model`, a {name}, gives other logits for a tree of tokens than for its paths (off by {error:.2g}), as "
            f"models with recurrent layers do: {USE_GENERATE}."
        )


def _compare_tree(model: PreTrainedModel) -> float:
    """
    How far the logits at the ends of a tree's paths differ from those after the paths alone, beyond rounding errors.
    """
    body, project, device = backbone(model), head_projection(model), model.device
    vocab_size = model.get_output_embeddings().weight.shape[0]
    one, two, end = (vocab_size * part // 5 for part in (1, 2, 3))
    rows = torch.tensor([one, two, end])
    paths = [[x, y, z, end] for x in (one, two) for y in (one, two) for z in (one, two)]
    tree = CompressedTrie(ItemTrie.from_sequences(paths, vocab_size).to(device))
    prompts = [[one, end, two, two, one], [one, two, end]]
    cache = TreeCache(body, tree, prompts, prefill_prefix(body, [one], device))
    cache.append(torch.tensor([[1, 2]] * 2, device=device))
    ends = cache.append(torch.tensor([[3, 4, 5, 6]] * 2, device=device))
    found = project(ends, rows=rows).cpu()

    paths = ([one, one], [one, two], [two, one], [two, two])
    inputs = [torch.tensor([prompt + path for path in paths], device=device) for prompt in prompts]
    states = [body(input_ids=input_ids, use_cache=False).last_hidden_state[:, -1] for input_ids in inputs]
    expected = project(torch.cat(states), rows=rows).cpu()
    tolerance = max(8 * torch.finfo(ends.dtype).eps, 1e-4) * expected.abs().max()
    return ((found - expected).abs().max() - tolerance).clamp(min=0).item()
