# SPDX-License-Identifier: Apache-2.0
"""
Fuse a trained model with popularity, a bonus for new items, and item-kNN or another model's scores: choose the weights
on the validation windows, and measure the result on the test windows once.

```bash
accelerate launch -m trl_msl.scripts.fuse --model_name_or_path outputs/mine/msl --output_dir outputs/mine/fused
```

Items are ranked by

    Σ log P_valid + vocab_weight · Σ log m
        + popularity_weight · log(1 + count) + neighbour_weight · f(neighbours) + new_item_weight · [count = 0]

and the search is exact. The neighbours of an item are those that the same users have and those with similar titles.
The data are those of the model's training, unless the data options name others. Weight 0 is always tried.
`output_dir` then holds the model with its neighbours and weights, which
`Recommender.from_pretrained(output_dir)` uses, `metrics.json` and `rankings.parquet`; the same files for each part
in a folder of its own, so that `trl-msl report --runs <output_dir>` compares them.

The scores of another model, such as SASRec, are read from a folder of `trl-msl baselines`. They cover only the
validation and test windows, so only results are written, no model:

```bash
trl-msl fuse --model_name_or_path outputs/mine/msl --scores outputs/mine/sasrec --output_dir outputs/mine/with-sasrec
```

A model is chosen with a gap before the validation windows, and then trained on all windows for the test. The weights
chosen for the one are taken over for the other, with item-kNN fitted on all windows, too:

```bash
trl-msl fuse --model_name_or_path outputs/mine/msl-all --weights_from outputs/mine/fused --train_period 0 1 \
    --output_dir outputs/mine/fused-all
```

A killed run resumes after its last search, on any number of processes, if options, windows and model are the same.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from trl import ModelConfig

from ..collaborative import WEIGHTS, Fusion, count_users
from ..data import DataArguments, RankingTask
from ..evaluation import coverage, ranking_metrics, ranks_of_targets
from ..recommender import find_folder
from .baselines import TOP_K
from .choose_fusion import ChoiceArguments, choose_neighbours, choose_weights_by_search, fit_earlier
from .command_line import command
from .derived import copy_model, new_folder, write_card
from .evaluate import compare
from .loading import Data, load_model
from .outputs import finish, format_table, write_results
from .recommend import check_job, model_fingerprints
from .searches import ScoredWindows, Searches, Split, rank_without_model
from .trained import load_trained


logger = logging.getLogger(__name__)

COLUMNS = (f"ndcg@{TOP_K}", "users_per_second", "expansions_mean", "exact_rate")


@dataclass
class FuseArguments(ChoiceArguments):
    """
    Arguments of this command, besides those of the data and the model, and of [`ChoiceArguments`].

    Parameters:
        output_dir (`str`):
            Folder to write, which must not exist.
        scores (`str`, *optional*):
            Folder with `scores_validation.parquet` and `scores_test.parquet` to use instead of item-kNN.
        weights_from (`str`, *optional*):
            Folder of an earlier run, whose weights and settings are used: nothing is chosen, and nothing but the test
            windows ranked. Not with `scores`.
        compare_vocab (`bool`, *optional*, defaults to `False`):
            Whether to measure the probability over the vocabulary too, by exact search and by ten beams.
        max_expansions (`int`, *optional*, defaults to `1024`):
            As for [`TrieDecoder.search`], also of the model that is written.
        batch_size (`int`, *optional*, defaults to `16`):
            Users per process that are decoded at a time.
        max_length (`int`, *optional*):
            Most tokens of a prompt and an item together, for models saved without a task.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    output_dir: str = field(kw_only=True, metadata={"help": "Folder to write, which must not exist."})
    scores: str | None = field(default=None, metadata={"help": "Folder with scores to use instead of item-kNN."})
    weights_from: str | None = field(default=None, metadata={"help": "Folder of a run whose weights are used."})
    compare_vocab: bool = field(default=False, metadata={"help": "Measure the probability over the vocabulary too."})
    max_expansions: int = field(default=1024, metadata={"help": "Most search steps per user."})
    batch_size: int = field(default=16, metadata={"help": "Users per process decoded at a time."})
    max_length: int | None = field(default=None, metadata={"help": "Longer prompts lose their oldest items."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_expansions", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be at least 1.")
        if None not in (self.weights_from, self.scores):
            raise ValueError("`weights_from` and `scores` are both given: pass one of them.")


class Ranking(NamedTuple):
    """The items that a system recommends to each user of a split, the ranks of the targets, and its metrics."""

    items: np.ndarray
    target_ranks: np.ndarray
    metrics: dict[str, float]


def main(args: FuseArguments, data_args: DataArguments, model_args: ModelConfig) -> None:
    if Path(args.output_dir).exists():
        raise ValueError(f"`output_dir` = {args.output_dir!r} exists already: name another, or remove it.")
    process = PartialState(cpu=not torch.accelerator.is_available())
    data, task = load_trained(model_args, data_args, args.max_length, args.trust_remote_code)
    # Saved with the model, too, which may have been trained with beams: these can't use biases
    task = dataclasses.replace(task, decoding={"mode": "exact", "max_expansions": args.max_expansions})
    names = ["test"] if args.weights_from else ["validation", "test"]
    splits = {name: Split.from_data(data, name, task) for name in names}
    model, parts = load_model(model_args, args.trust_remote_code), Path(f"{args.output_dir}.parts")
    job = {**vars(args), **vars(model_args), **model_fingerprints(model, task), **data_fingerprint(args, data)}
    with process.main_process_first():
        check_job(parts, job)
    searches = Searches(model, task, parts, args.max_expansions, args.batch_size)
    fusion, chosen, settings = choose(args, data, splits, searches)
    process.wait_for_everyone()
    # No test window has been ranked before
    found = {name: rank(args, split, searches, fusion, chosen) for name, split in splits.items()}
    process.wait_for_everyone()  # before the main process removes what others may still read
    if process.is_main_process:
        results = {split: {name: row.metrics for name, row in rows.items()} for split, rows in found.items()}
        tested = found["test"]
        others = {name: row for name, row in tested.items() if name != "fused"}
        differences = {f"fused - {name}": compare(tested["fused"], row, [TOP_K]) for name, row in others.items()}
        weights = {name: getattr(chosen["fused"], name) for name in WEIGHTS} | settings
        num_users = None if args.weights_from else len(splits["validation"].targets)
        notes = describe(args, weights, num_users, tested)
        arguments = {"model_name_or_path": model_args.model_name_or_path, **vars(args), "data": vars(data.args)}
        report = {"chosen": weights, "notes": notes, **results, "differences": differences, "arguments": arguments}
        write(args, model_args, data, task, chosen["fused"], splits["test"].target_ids, tested, report)
        shutil.rmtree(parts)
        for name, split in splits.items():
            title = f"{name.capitalize()}, {len(split.targets)} users, {len(task.catalog)} items"
            if count := results[name]["model"].get("num_cold"):
                title += f", {count} cold targets"
            print(f"\n{title}\n{format_table(results[name], COLUMNS)}")
        table = format_table(differences, (f"ndcg@{TOP_K}", "same_items"))
        print(f"\nDifference on test, with its interval\n{table}\n", *notes, sep="\n")
        print(f"\n{args.output_dir}/metrics.json")
    finish()


def choose(
    args: FuseArguments, data: Data, splits: dict[str, Split], searches: Searches
) -> tuple[Fusion, dict[str, Fusion], dict[str, float]]:
    """The parts of the fusion with all weights 0, the rows with their weights, and the settings of item-kNN."""
    if args.weights_from:
        fusion, weights, settings = fit_earlier(args.weights_from, data)
        return fusion, {"fused": dataclasses.replace(fusion, **weights)}, settings
    if args.scores:
        scored = ScoredWindows(Path(args.scores), list(splits.values()), data.catalog)
        fusion, settings = Fusion(count_users(*data.training_windows()), scored), {}
    else:
        fusion, settings = choose_neighbours(args, data, splits["validation"], searches.available)
    return fusion, choose_weights_by_search(args, searches, splits["validation"], fusion), settings


def data_fingerprint(args: FuseArguments, data: Data) -> dict[str, str]:
    """SHA-256 of the windows, and of another model's scores or an earlier run's weights."""
    digest = hashlib.sha256(json.dumps({name: split["item_ids"][:] for name, split in data.windows.items()}).encode())
    scores = sorted(Path(args.scores).glob("scores_*.parquet")) if args.scores else []
    earlier = list(Path(args.weights_from).glob("metrics.json")) if args.weights_from else []
    for path in scores + earlier:
        digest.update(path.read_bytes())
    return {"data_sha256": digest.hexdigest()}


def rank(
    args: FuseArguments, split: Split, searches: Searches, fusion: Fusion, chosen: dict[str, Fusion]
) -> dict[str, Ranking]:
    """The ten best items of each system, and their metrics."""
    found = {"model": searches.find(split, fusion, TOP_K)}
    if args.compare_vocab:
        found["beam-vocab"] = searches.find(split, None, TOP_K)
        found["vocab"] = searches.find(split, dataclasses.replace(fusion, vocab_weight=1.0), TOP_K)
    found |= {name: searches.find(split, by, TOP_K) for name, by in chosen.items()}
    found["popularity"] = dataclasses.replace(fusion, neighbours=None)
    found["scores" if args.scores else "neighbours"] = fusion
    rankings = {}
    for name, result in found.items():
        if isinstance(result, Fusion):
            started, costs = time.perf_counter(), {}
            items = rank_without_model(result, split.histories, searches.available)
            seconds = time.perf_counter() - started
        else:
            items, seconds = result.items, float(result.seconds)
            costs = {"expansions_mean": float(result.expansions.mean()), "exact_rate": float(result.exact.mean())}
        ranks = ranks_of_targets(items, split.targets)
        metrics = ranking_metrics(ranks, (5, TOP_K), confidence=0.95, is_cold=split.is_cold) | costs
        metrics |= {"coverage": coverage(items, fusion.num_items), "num_rows": len(ranks)}
        metrics |= {"test_seconds": seconds, "users_per_second": len(ranks) / seconds}
        rankings[name] = Ranking(items, ranks, metrics)
    return rankings


def describe(
    args: FuseArguments, chosen: dict[str, float], num_users: int | None, tested: dict[str, Ranking]
) -> list[str]:
    """What was chosen on validation, which weights are the first or the last tried, and which rows are not exact."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in chosen.items())
    if num_users is None:
        lines = [f"From {args.weights_from}: {values}"]
    else:
        lines = [f"Chosen on {num_users} validation users, so that the values there are too high: {values}"]
    for name in WEIGHTS if num_users else ():
        tried = getattr(args, f"{name}s")
        if chosen[name] == 0:
            lines.append(f"{name} is 0: no other weight was better on validation.")
        elif chosen[name] in (tried[0], tried[-1]):
            lines.append(f"{name} is at the end of the values tried: try others beyond it by --{name}s.")
    for name in ("title_weight", "new_title_weight") if num_users else ():
        if 0 < chosen.get(name, 0) == getattr(args, f"{name}s")[-1]:
            lines.append(f"{name} is the largest value tried: try others beyond it by --{name}s.")
    for name, row in tested.items():
        if name != "beam-vocab" and (rate := row.metrics.get("exact_rate", 1)) < 1:
            lines.append(f"{name}: {1 - rate:.1%} of the test searches ended early: raise --max_expansions.")
    return lines


def write(
    args: FuseArguments,
    model_args: ModelConfig,
    data: Data,
    task: RankingTask,
    best: Fusion,
    targets: list[str],
    tested: dict[str, Ranking],
    report: dict[str, Any],
) -> None:
    """Write `output_dir`: what [`report`] compares systems by and, if there are neighbours, the model with them."""
    with new_folder(args.output_dir) as folder:
        if args.scores:
            logger.info("No model is written, as the scores cover only these windows.")
        else:
            source = find_folder(model_args.model_name_or_path, "model_name_or_path", model_args.model_revision)
            copy_model(source, folder)
            task.save_pretrained(folder)
            best.save_pretrained(folder)
            weights = ", ".join(f"{name} {report['chosen'][name]:g}" for name in WEIGHTS)
            note = f"Ranks by the model, popularity, novelty and neighbours. The weights are {weights}. "
            note += "The metrics below are those of the model alone."
            write_card(source, folder, args.output_dir, note)
        for name, ranking in tested.items():
            metrics = dict(ranking.metrics)
            if "validation" in report:
                metrics[f"validation_ndcg@{TOP_K}"] = report["validation"][name][f"ndcg@{TOP_K}"]
            metrics |= report if name == "fused" else {}
            place = folder if name == "fused" else folder / name
            write_results(place, metrics, task.catalog, targets, ranking.items, ranking.target_ranks, data.seen_items)


run = command(main)


if __name__ == "__main__":
    run()
