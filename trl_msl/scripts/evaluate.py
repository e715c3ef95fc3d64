# SPDX-License-Identifier: Apache-2.0
"""
Evaluate a trained recommender: a folder or Hub repository with a model or a LoRA adapter.

```bash
accelerate launch -m trl_msl.scripts.evaluate --model_name_or_path outputs/quickstart/msl
```

Items, prompt and maximum length are those that the model was trained with; options that contradict them are an error.
The windows are those of the data options, by default those of the model's training, which its `data.json` names. Other
windows need only the log, or a folder with `test.csv`:

```bash
trl-msl evaluate --model_name_or_path user/my-recommender --interactions log.csv
```

Several ways of decoding are compared on the same users, each with the first:

```bash
accelerate launch -m trl_msl.scripts.evaluate --model_name_or_path outputs/quickstart/msl \
    --decoding exact beam beam-vocab
```

If exact search by the score of the beams is among them, the command also says how many of the best items the beams
lose, and where.

Exact searches by several values of λ, the weight of the valid tokens' share in the score, are compared likewise:
`--vocab_weight 0 0.5 1`.

So are several exponents of the popularity by grounding, `--decoding grounding --popularity_gamma 0 1 10`.

Writes `metrics.json` and `recommendations.txt` into `--output_dir`, which for this model is
`outputs/evaluate/outputs/quickstart/msl` by default; and into a folder there for each way of decoding what
`trl-msl report` compares.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel
from trl import ModelConfig

from ..collaborative import count_users
from ..data import DataArguments, RankingTask
from ..decoding import Grounder, Recommendations, check_gamma
from ..evaluation import (
    TEMPERATURES,
    beam_pruning,
    bootstrap_interval,
    calibrate,
    evaluate_recommendations,
    mean_by_group,
    per_user_metrics,
    target_log_probs,
)
from .command_line import command
from .loading import Data, load_model
from .outputs import describe_recommendations, finish, format_table, write_json, write_results, write_text
from .trained import load_trained


DECODINGS = {
    "exact": {"mode": "exact"},
    "beam": {"mode": "beam", "normalize": "trie"},
    "beam-vocab": {"mode": "beam", "normalize": "vocab"},
    "generate": {"mode": "generate", "normalize": "trie"},
}
SAME_SCORE = {"beam": "exact", "beam-vocab": "exact-1"}  # exact search by the score of the beams


@dataclass
class EvaluationArguments:
    """
    Arguments of this command, besides those of the data and the model.

    Parameters:
        output_dir (`str`, *optional*):
            Folder to write into. By default it is named after the model, in `outputs/evaluate`.
        split (`str`, *optional*, defaults to `"test"`):
            `validation` or `test`.
        top_k (`int`, *optional*, defaults to `10`):
            Number of items to rank. Above 10, metrics of the first 10 are given as well.
        target_log_probs (`bool`, *optional*, defaults to `False`):
            Whether to give the log-probability of the target, too: see [`target_log_probs`].
        decoding (`list[str]`, *optional*, defaults to `["exact"]`):
            How to find the best items: `exact`; `beam`, beam search by the restricted probability that MSL trains;
            `beam-vocab`, by the probability over the vocabulary, as in published code; `generate`, the same as
            `beam`, for models that the engine can't run; or `grounding`, by a title written freely: see [`Grounder`].
        vocab_weight (`list[float]`, *optional*, defaults to `[0.0]`):
            As for [`recommend`]. For `exact` only, which is repeated for each value.
        max_expansions (`int`, *optional*, defaults to `1024`):
            As for [`recommend`]. For `exact` only.
        popularity_gamma (`list[float]`, *optional*, defaults to `[0.0]`):
            As for [`Grounder`]. For `grounding` only, which is repeated for each value.
        num_beams (`int`, *optional*):
            Beam width, by default `top_k`, and 4 for `grounding`.
        length_penalty (`float`, *optional*, defaults to `0.0`):
            As for `generate`. For beams only.
        match (`str`, *optional*, defaults to `"id"`):
            Whether a hit is the item itself (`id`) or any item with its text (`text`).
        batch_size (`int`, *optional*, defaults to `16`):
            Users per process that are decoded at a time.
        max_length (`int`, *optional*):
            Most tokens of a prompt and an item together, for models saved without a task.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder to write into, by default `outputs/evaluate/` and the model's name."}
    )
    split: str = field(default="test", metadata={"help": "Split.", "choices": ["validation", "test"]})
    top_k: int = field(default=10, metadata={"help": "Number of items to rank."})
    target_log_probs: bool = field(default=False, metadata={"help": "Give the target's log-probability, too."})
    decoding: list[str] = field(
        default_factory=lambda: ["exact"],
        metadata={"help": "How to decode.", "choices": [*DECODINGS, "grounding"]},
    )
    vocab_weight: list[float] = field(
        default_factory=lambda: [0.0],
        metadata={
            "help": "Share of the vocabulary's probability in the score. For exact search, once for each value."
        },
    )
    max_expansions: int = field(default=1024, metadata={"help": "Limit of exact search, per user."})
    popularity_gamma: list[float] = field(
        default_factory=lambda: [0.0],
        metadata={"help": "Exponent of the popularity. For grounding, once for each value."},
    )
    num_beams: int | None = field(default=None, metadata={"help": "Beam width, `top_k` by default; grounding: 4."})
    length_penalty: float = field(default=0.0, metadata={"help": "As for `generate`. For beams only."})
    match: str = field(default="id", metadata={"help": "What counts as a hit.", "choices": ["id", "text"]})
    batch_size: int = field(default=16, metadata={"help": "Users per process decoded at a time."})
    max_length: int | None = field(default=None, metadata={"help": "Longer prompts lose their oldest items."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def main(args: EvaluationArguments, data_args: DataArguments, model_args: ModelConfig) -> None:
    decodings = make_decodings(args)
    process = PartialState(cpu=not torch.accelerator.is_available())
    output_dir = find_output_dir(args.output_dir, model_args.model_name_or_path)
    data, task = load_trained(model_args, data_args, args.max_length, args.trust_remote_code)
    rows = data.rows(args.split, task)
    model = load_model(model_args, args.trust_remote_code)
    add_grounder(decodings, args.num_beams, model, task, data, rows)
    ks = sorted({min(5, args.top_k), min(10, args.top_k), args.top_k})
    settings = {"ks": ks, "match": args.match, "batch_size": args.batch_size, "seen_items": data.seen_items}
    results, found = evaluate_decodings(decodings, model, task, rows, **settings)
    pruning = {name: beam_pruning(found[SAME_SCORE[name]], found[name]) for name in found if found[name].lost_at.size}
    first, *others = found
    differences = {f"{other} - {first}": compare(found[other], found[first], ks) for other in others}
    log_probs, columns = {}, {}
    if args.target_log_probs:
        log_probs, columns = score_targets(model, task, rows, args.batch_size, found[first].is_cold)
    if process.is_main_process:
        text = describe_recommendations(rows, task.catalog, found[first])
        arguments = {"model_name_or_path": model_args.model_name_or_path, **vars(args), "data": vars(data.args)}
        report = {**results, "differences": differences, "pruning": pruning, "arguments": arguments}
        if log_probs:
            report["target_log_probs"] = log_probs
        write_json(output_dir / "metrics.json", report)
        write_text(output_dir / "recommendations.txt", text)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        for name, result in found.items():  # a system each for the report
            metrics = results[name] | {"decoding": name, "num_parameters": num_parameters}
            is_cold = {} if result.is_cold is None else {"is_cold": result.is_cold}
            ranking = (rows["item_id"][:], result.items, result.target_ranks)
            write_results(output_dir / name, metrics, task.catalog, *ranking, columns=is_cold | columns)
        shown = (f"ndcg@{min(10, args.top_k)}", f"hr@{min(10, args.top_k)}")
        if args.top_k > 10:
            shown += (f"ndcg@{args.top_k}", f"mrr@{args.top_k}")
        title = f"{model_args.model_name_or_path}, {args.split}, {len(rows)} users, {len(task.catalog)} items"
        if count := results[first].get("withdrawn_targets"):
            title += f"; {count} targets are withdrawn and count as misses"
        if count := results[first].get("num_cold"):
            title += f"; {count} targets are cold"
        print(f"{text}\n{title}\n{format_table(results, shown)}")
        if differences:
            print(f"\nDifference, with its interval\n{format_table(differences, (*shown, 'same_items'))}")
        if pruning:
            print(f"\nWhat beams lose of the true top {args.top_k}\n{format_pruning(pruning)}")
        if log_probs:
            temperatures = " and ".join(f"{value:.2f}" for value in log_probs["log_prob_calibrated"]["temperatures"])
            print(f"\nLog-probability of the target, calibrated by τ = {temperatures} for half of the users each")
            print(format_table(log_probs, ("mean",)))
        print(f"\n{output_dir}/metrics.json")
    finish()


def find_output_dir(output_dir: str | None, name: str) -> Path:
    """The folder to write into, by default named after the model; not one with the results of a training."""
    if output_dir is None:
        path = Path(name)
        return Path("outputs/evaluate", *(part for part in path.parts if part not in (path.anchor, "..")))
    if (Path(output_dir) / "log_history.json").exists():  # a YAML file of the training may name it
        raise ValueError(
            f"`output_dir` = {output_dir!r} holds the results of a training, which would be replaced: pass another."
        )
    return Path(output_dir)


def make_decodings(args: EvaluationArguments) -> dict[str, dict[str, Any]]:
    """The ways of decoding to compare, by name: arguments of [`evaluate_recommendations`]."""
    has_beams = not {"exact", "grounding"}.issuperset(args.decoding)
    if not has_beams and (args.length_penalty or (args.num_beams and "grounding" not in args.decoding)):
        raise ValueError(
            "`num_beams` and `length_penalty` have no effect on exact search, and the latter none on grounding: add "
            "beam to `decoding`."
        )
    if "exact" not in args.decoding and (args.vocab_weight != [0] or args.max_expansions != 1024):
        raise ValueError("`vocab_weight` and `max_expansions` have no effect on beams: add exact to `decoding`.")
    if "grounding" not in args.decoding and args.popularity_gamma != [0]:
        raise ValueError("`popularity_gamma` has an effect on grounding only: add it to `decoding`.")
    decodings = {}
    for name in args.decoding:
        if name == "exact":
            for weight in args.vocab_weight:
                score = {"vocab_weight": weight, "max_expansions": args.max_expansions}
                decodings[f"{name}-{weight:g}" if weight else name] = DECODINGS[name] | score
        elif name == "grounding":
            for gamma in args.popularity_gamma:
                check_gamma(gamma)
                decodings[f"{name}-{gamma:g}" if gamma else name] = {"popularity_gamma": gamma}
        else:
            beams = {"num_beams": args.num_beams, "length_penalty": args.length_penalty}
            decodings[name] = DECODINGS[name] | beams
    return decodings


def add_grounder(
    decodings: dict[str, dict[str, Any]],
    num_beams: int | None,
    model: PreTrainedModel,
    task: RankingTask,
    data: Data,
    rows: Dataset,
) -> None:
    """Add to all ways of decoding by grounding what ranks for them: one [`Grounder`], which writes titles once."""
    grounded = [decoding for decoding in decodings.values() if "popularity_gamma" in decoding]
    popularity = None
    if any(decoding["popularity_gamma"] for decoding in grounded):
        if "train" not in data.windows:
            raise ValueError("`popularity_gamma` is above 0, but the data has no training windows: add `train_file`.")
        popularity = count_users(*data.training_windows())
    if grounded:
        grounder = Grounder(model, task, task.ranking_prompts(rows[:]), popularity, num_beams or 4)
    for decoding in grounded:
        decoding["rank"] = grounder


def evaluate_decodings(
    decodings: dict[str, dict[str, Any]], model: PreTrainedModel, task: RankingTask, rows: Dataset, **settings: Any
) -> tuple[dict[str, dict[str, float]], dict[str, Recommendations]]:
    """
    Metrics and recommendations of one model by each of several ways of decoding: the arguments of
    [`evaluate_recommendations`] by name, besides the `settings` that all have.
    """
    results, found = {}, {}
    for name in sorted(decodings, key=SAME_SCORE.__contains__):  # beams last, as they follow the items found exactly
        decoding = decodings[name]
        started = time.time() - getattr(decoding.get("rank"), "seconds", 0.0)  # what it does once, each row takes
        if SAME_SCORE.get(name) in found and not decoding.get("length_penalty"):
            decoding = decoding | {"follow": found[SAME_SCORE[name]].items}
        results[name], found[name] = evaluate_recommendations(
            model, task, rows, return_recommendations=True, **settings, **decoding
        )
        results[name]["test_seconds"] = round(time.time() - started, 1)
        for counter in ("expansions", "rounds"):
            counts = getattr(found[name], counter)
            results[name] |= {f"{counter}_mean": float(counts.mean()), f"{counter}_max": int(counts.max())}
    return {name: results[name] for name in decodings}, {name: found[name] for name in decodings}


def score_targets(
    model: PreTrainedModel, task: RankingTask, rows: Dataset, batch_size: int, is_cold: np.ndarray | None
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """
    Log-probabilities of the targets: their means, and the value of each row. `log_prob` is the one among the items,
    `log_prob_calibrated` the same at the best temperature, and `log_prob_vocab` the one over the vocabulary.
    """
    by_temperature, vocab = target_log_probs(model, task, rows, batch_size=batch_size)
    calibrated, temperatures = calibrate(by_temperature)
    values = {"log_prob": by_temperature[:, TEMPERATURES.index(1)], "log_prob_calibrated": calibrated}
    values["log_prob_vocab"] = vocab
    means = {name: mean_by_group(value, is_cold) for name, value in values.items()}
    means["log_prob_calibrated"]["temperatures"] = temperatures
    return means, values


def compare(found: Recommendations, other: Recommendations, ks: list[int]) -> dict[str, float]:
    """
    Mean differences of the metrics of the same users, with their bootstrap intervals; and the share of users for whom
    both found the same items, in any order.
    """
    difference = {"same_items": float((np.sort(found.items) == np.sort(other.items)).all(axis=1).mean())}
    values, others = (per_user_metrics(result.target_ranks, tuple(ks)) for result in (found, other))
    for name in values:
        per_user = values[name] - others[name]
        difference[name] = float(per_user.mean())
        difference[f"{name}_low"], difference[f"{name}_high"] = bootstrap_interval(per_user)
    return difference


def format_pruning(pruning: dict[str, dict[str, Any]]) -> str:
    """Shares of users, items and targets, a row per way of decoding, and at which tokens items are lost."""
    lines = [format_table(pruning, ("pruned_users", "pruned_items", "pruned_targets"))]
    for name, shares in pruning.items():
        tokens = [f"{share:.4f} at {place}" for place, share in enumerate(shares["pruned_by_token"], start=1) if share]
        lines.append(f"{name}, items by the token at which they are pruned: {', '.join(tokens) or 'none'}")
    return "\n".join(lines)


run = command(main)


if __name__ == "__main__":
    run()
