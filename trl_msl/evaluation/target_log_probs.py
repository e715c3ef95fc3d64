# SPDX-License-Identifier: Apache-2.0
"""The log-probability that a model gives its targets, also with the temperature that fits it best."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import RankingTask
from ..decoding import next_token_log_probs
from ..model import backbone, check_head, check_whole, evaluating, head_projection
from ..trie import ItemTrie, logsumexp_by_row
from .metrics import bootstrap_interval


# 1/4 to 16 in steps of 9%, between which the mean log-probability hardly changes
TEMPERATURES = tuple(2 ** (eighths / 8) for eighths in range(-16, 33))


def target_log_probs(
    model: PreTrainedModel,
    task: RankingTask,
    rows: Dataset,
    temperatures: Sequence[float] = TEMPERATURES,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Log-probability of each row's target, from one forward pass over its prompt and title.

    Ranks say nothing of targets that are far from the top; log-probabilities compare models on all users. Under
    `accelerate launch` each process takes a share of the rows, and all get the whole result.

    Args:
        model, task:
            As for [`recommend`].
        rows ([`~datasets.Dataset`]):
            As for [`evaluate_recommendations`].
        temperatures (`Sequence[float]`, *optional*):
            Temperatures τ, by which the logits of each token are divided. By default from 1/4 to 16.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of rows in a forward pass.

    Returns:
        `tuple` of two `numpy.ndarray`, float64: of shape `(num_rows, num_temperatures)`, the sum of the
        log-probabilities of the title's tokens among the valid tokens, at τ = 1 what [`TrieDecoder.score_items`]
        gives; and of shape `(num_rows,)`, the same over the vocabulary, at τ = 1. Items with the same text share them.

    Raises:
        `ValueError`: if the model is sharded, has virtual tokens, or a head whose rows can't be picked.
    """
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(f"`model` has a {kind} adapter, whose virtual tokens would be left out: pass another model.")
    check_whole(model)
    base = model.get_base_model() if is_peft_model(model) else model
    check_head(base, task.trie)
    trie, project = task.trie.to(base.device), head_projection(base)
    project = functools.partial(project, weight=project.keywords["weight"].float())  # cast once
    prompts, targets = task.ranking_prompts(rows[:]), torch.tensor(task.catalog.indices(rows["item_id"]))
    process, found = PartialState(), np.zeros((len(prompts), len(temperatures) + 1))
    mine = range(process.process_index, len(prompts), process.num_processes)
    order = sorted(mine, key=lambda row: -len(prompts[row]))  # rows of similar length share a batch
    starts = range(0, len(order), batch_size)
    with evaluating(model):
        for start in tqdm(starts, desc="Log-probabilities", disable=not process.is_local_main_process):
            chosen = order[start : start + batch_size]
            paths = trie.paths(trie.item_nodes[targets[chosen].to(trie.device)])
            some = [prompts[row] for row in chosen]
            found[chosen] = _score_batch(backbone(base), project, trie, some, paths, temperatures)
    found = sum(gather_object([found]))  # rows of other processes are 0
    return found[:, :-1], found[:, -1]


def _score_batch(
    body: PreTrainedModel,
    project: Callable[..., Tensor],
    trie: ItemTrie,
    prompts: list[list[int]],
    paths: Tensor,
    temperatures: Sequence[float],
) -> np.ndarray:
    """
    Log-probability of a title after each prompt, given by its `paths` in the trie: among the valid tokens at each
    temperature, and over the vocabulary. Shape `(num_prompts, num_temperatures + 1)`.
    """
    row, place = (paths >= 0).nonzero(as_tuple=True)
    nodes = paths[row, place]
    tokens, device = trie.tokens(nodes), trie.device
    titles = tokens.cpu().split((paths >= 0).sum(1).tolist())
    inputs = [torch.cat([torch.tensor(prompt), title[:-1]]) for prompt, title in zip(prompts, titles)]
    input_ids = pad_sequence(inputs, batch_first=True).to(device)
    mask = pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True).to(device)
    hidden = body(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state.to(device)
    before = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    position, valid = trie.valid_tokens(trie.parents(nodes))
    log_probs = next_token_log_probs(project, hidden[row, before[row] + place], position, valid, vocab_weight=1.0)
    is_target = valid == tokens[position]
    found = []
    for temperature in temperatures:
        scaled = log_probs / temperature  # as good as logits, from which they differ by a number for each position
        found.append(scaled[is_target] - logsumexp_by_row(scaled, position, len(nodes)))
    found.append(log_probs[is_target])
    sums = torch.zeros(len(prompts), len(found), dtype=torch.float64)
    return sums.index_add_(0, row.cpu(), torch.stack(found, dim=1).double().cpu()).numpy()


def calibrate(
    log_probs: np.ndarray, temperatures: Sequence[float] = TEMPERATURES
) -> tuple[np.ndarray, tuple[float, float]]:
    """
    Log-probabilities at the temperature with the best mean, so that a model trained at a high temperature, which is
    flat at τ = 1, or an overconfident one can be compared with others.

    The temperature of every other row is chosen on the rest of the rows, and the other way round: no row has a say in
    its own.

    Args:
        log_probs (`numpy.ndarray` of shape `(num_rows, num_temperatures)`):
            From [`target_log_probs`].
        temperatures (`Sequence[float]`, *optional*):
            Temperatures of the columns.

    Returns:
        `tuple` of a `numpy.ndarray` of shape `(num_rows,)`, and the temperatures of the even and of the odd rows.

    Raises:
        `ValueError`: if there are fewer than two rows.
    """
    if len(log_probs) < 2:
        raise ValueError(f"`log_probs` has {len(log_probs)} rows: a temperature is chosen on at least two.")
    best = [int(log_probs[1 - half :: 2].mean(axis=0).argmax()) for half in (0, 1)]
    values = np.empty(len(log_probs))
    for half in (0, 1):
        values[half::2] = log_probs[half::2, best[half]]
    return values, (temperatures[best[0]], temperatures[best[1]])


def mean_by_group(values: np.ndarray, is_cold: np.ndarray | None = None) -> dict[str, float]:
    """
    Mean of a value per user, with its 95% bootstrap interval; with `is_cold`, also of warm and of cold targets.

    Returns:
        `dict` of `mean`, `mean_low`, `mean_high`; with `is_cold` also of `num_warm`, `num_cold` and, of each group
        that has a user, `mean_warm`, `mean_warm_low` and so on.
    """
    groups = {"": np.ones(len(values), dtype=bool)}
    if is_cold is not None:
        groups |= {"_warm": ~is_cold, "_cold": is_cold}
    means = {f"num{group}": int(chosen.sum()) for group, chosen in groups.items() if group}
    for group, chosen in groups.items():
        if chosen.any():
            name = f"mean{group}"
            means[name] = float(values[chosen].mean())
            means[f"{name}_low"], means[f"{name}_high"] = bootstrap_interval(values[chosen])
    return means
