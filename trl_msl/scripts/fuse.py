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

and the search is exact. The data are those of the model's training, unless the data options name others. Weight 0 is
always tried. `output_dir` then holds the model with its neighbours and weights, which
`Recommender.from_pretrained(output_dir)` uses, `metrics.json` and `rankings.parquet`; the same files for each part
in a folder of its own, so that `trl-msl report --runs <output_dir>` compares them.

The scores of another model, such as SASRec, are read from a folder of `trl-msl baselines`. They cover only the
validation and test windows, so only results are written, no model:

```bash
trl-msl fuse --model_name_or_path outputs/mine/msl --scores outputs/mine/sasrec --output_dir outputs/mine/with-sasrec
```

A killed run resumes after its last search, on any number of processes, if options, windows and model are the same.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from trl import ModelConfig

from ..collaborative import WEIGHTS, Fusion, ItemNeighbours, count_users
from ..data import DataArguments, RankingTask
from ..evaluation import choose_weights, coverage, ranking_metrics, ranks_of_targets
from ..recommender import find_folder
from .baselines import TOP_K
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
class FuseArguments:
    """
    Arguments of this command, besides those of the data and the model.

    Parameters:
        output_dir (`str`):
            Folder to write, which must not exist.
        scores (`str`, *optional*):
            Folder with `scores_validation.parquet` and `scores_test.parquet` to use instead of item-kNN.
        vocab_weights, popularity_weights, neighbour_weights, new_item_weights (`list[float]`, *optional*):
            Weights to try, besides 0. Each of the first takes three searches of all validation windows.
        compare_vocab (`bool`, *optional*, defaults to `False`):
            Whether to measure the probability over the vocabulary too, by exact search and by ten beams.
        decays, shrinkages (`list[float]`, *optional*):
            `decay` and `shrinkage` of [`ItemNeighbours`] to try.
        num_neighbours (`int`, *optional*, defaults to `100`):
            As for [`ItemNeighbours`].
        num_candidates (`int`, *optional*, defaults to `100`):
            Number of items of each validation window that weights are tried on.
        max_expansions (`int`, *optional*, defaults to `1024`):
            As for [`TrieDecoder.search`], also of the model that is written.
        batch_size (`int`, *optional*, defaults to `16`):
            Users per process that are decoded at a time.
        max_length (`int`, *optional*):
            Most tokens of a prompt and an item together, for models saved without a task.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    output_dir: str = field(metadata={"help": "Folder to write, which must not exist."})
    scores: str | None = field(default=None, metadata={"help": "Folder with scores to use instead of item-kNN."})
    vocab_weights: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 1.0], metadata={"help": "Weights of the valid tokens' share to try."}
    )
    popularity_weights: list[float] = field(
        default_factory=lambda: [-1.0, -0.5, -0.25, 0.0, 0.25, 1.0], metadata={"help": "Weights of popularity to try."}
    )
    neighbour_weights: list[float] = field(
        default_factory=lambda: [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
        metadata={"help": "Weights of the neighbours to try."},
    )
    new_item_weights: list[float] = field(
        default_factory=lambda: [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        metadata={"help": "Weights of new items to try."},
    )
    compare_vocab: bool = field(default=False, metadata={"help": "Measure the probability over the vocabulary too."})
    decays: list[float] = field(
        default_factory=lambda: [0.3, 0.5, 0.7, 0.85, 1.0], metadata={"help": "Decays of item-kNN to try."}
    )
    shrinkages: list[float] = field(
        default_factory=lambda: [0.0, 1.0, 5**0.5, 5.0], metadata={"help": "Shrinkages of item-kNN to try."}
    )
    num_neighbours: int = field(default=100, metadata={"help": "Neighbours of each item in item-kNN."})
    num_candidates: int = field(default=100, metadata={"help": "Items per window that weights are tried on."})
    max_expansions: int = field(default=1024, metadata={"help": "Most search steps per user."})
    batch_size: int = field(default=16, metadata={"help": "Users per process decoded at a time."})
    max_length: int | None = field(default=None, metadata={"help": "Longer prompts lose their oldest items."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self):
        for name in ("num_neighbours", "num_candidates", "max_expansions", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be at least 1.")
        for name in (f"{weight}s" for weight in WEIGHTS):
            weights = getattr(self, name)
            is_valid = all(map(math.isfinite, weights)) and (name != "vocab_weights" or min(weights, default=0) >= 0)
            if not is_valid:
                least = ", at least 0" if name == "vocab_weights" else ""
                raise ValueError(f"`{name}` is {weights}: pass finite numbers{least}.")
            setattr(self, name, sorted({0.0, *weights}))
        for name in ("decays", "shrinkages"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty: pass at least one number.")


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
    validation, test = splits = [Split.from_data(data, name, task) for name in ("validation", "test")]
    model, parts = load_model(model_args, args.trust_remote_code), Path(f"{args.output_dir}.parts")
    job = {**vars(args), **vars(model_args), **model_fingerprints(model, task), **data_fingerprint(args, data)}
    with process.main_process_first():
        check_job(parts, job)
    searches = Searches(model, task, parts, args.max_expansions, args.batch_size)
    fusion, settings = fit(args, data, splits, searches.available)
    chosen = choose(args, searches, validation, fusion)
    process.wait_for_everyone()
    # No test window has been ranked before
    found = {split.name: rank(args, split, searches, fusion, chosen) for split in splits}
    process.wait_for_everyone()  # before the main process removes what others may still read
    if process.is_main_process:
        results = {split: {name: row.metrics for name, row in rows.items()} for split, rows in found.items()}
        tested = found["test"]
        others = {name: row for name, row in tested.items() if name != "fused"}
        differences = {f"fused - {name}": compare(tested["fused"], row, [TOP_K]) for name, row in others.items()}
        weights = {name: getattr(chosen["fused"], name) for name in WEIGHTS} | settings
        notes = describe(args, weights, len(validation.targets), tested)
        arguments = {"model_name_or_path": model_args.model_name_or_path, **vars(args), "data": vars(data.args)}
        report = {"chosen": weights, "notes": notes, **results, "differences": differences, "arguments": arguments}
        write(args, model_args, data, task, chosen["fused"], test.target_ids, tested, report)
        shutil.rmtree(parts)
        for split in splits:
            title = f"{split.name.capitalize()}, {len(split.targets)} users, {len(task.catalog)} items"
            if count := results[split.name]["model"].get("num_cold"):
                title += f", {count} cold targets"
            print(f"\n{title}\n{format_table(results[split.name], COLUMNS)}")
        table = format_table(differences, (f"ndcg@{TOP_K}", "same_items"))
        print(f"\nDifference on test, with its interval\n{table}\n", *notes, sep="\n")
        print(f"\n{args.output_dir}/metrics.json")
    finish()


def data_fingerprint(args: FuseArguments, data: Data) -> dict[str, str]:
    """SHA-256 of the windows and of another model's scores."""
    digest = hashlib.sha256(json.dumps({name: split["item_ids"][:] for name, split in data.windows.items()}).encode())
    for path in sorted(Path(args.scores).glob("scores_*.parquet")) if args.scores else ():
        digest.update(path.read_bytes())
    return {"data_sha256": digest.hexdigest()}


def fit(args: FuseArguments, data: Data, splits: list[Split], available: list[int]) -> tuple[Fusion, dict[str, float]]:
    """Popularity and neighbours from the training windows, with the settings that are best on validation."""
    train, catalog, (validation, _) = data.windows["train"], data.catalog, splits
    windows = [catalog.indices(ids) for ids in train["item_ids"]], train["user_id"][:], len(catalog)
    fusion = Fusion(count_users(*windows))
    if args.scores:
        return dataclasses.replace(fusion, neighbours=ScoredWindows(Path(args.scores), splits, catalog)), {}
    best, best_ndcg = {}, -1.0
    for shrinkage in args.shrinkages:
        fitted = ItemNeighbours.fit(*windows, args.num_neighbours, shrinkage)
        for decay in args.decays:
            tried = dataclasses.replace(fusion, neighbours=dataclasses.replace(fitted, decay=decay))
            ndcg = mean_ndcg(rank_without_model(tried, validation.histories, available), validation)
            if ndcg > best_ndcg:
                best, best_ndcg, best_fusion = {"decay": decay, "shrinkage": shrinkage}, ndcg, tried
    logger.info("Item-kNN with decay %g and shrinkage %g: NDCG@10 %.4f on validation", *best.values(), best_ndcg)
    return best_fusion, best


def mean_ndcg(items: np.ndarray, split: Split) -> float:
    return ranking_metrics(ranks_of_targets(items, split.targets), (TOP_K,))[f"ndcg@{TOP_K}"]


def choose(args: FuseArguments, searches: Searches, validation: Split, fusion: Fusion) -> dict[str, Fusion]:
    """
    The best weights on validation: of `vocab_weight` alone, then also of popularity, of new items, and of all parts.

    Weights are tried on the candidates found by all searches before: for each `vocab_weight`, one by medium weights of
    popularity and neighbours, one by the largest weight of new items and one without any; and searches by the weights
    chosen. The NDCG of the latter decides.
    """
    targets, candidates = validation.targets, {}

    def search(tried: Fusion, top_k: int = TOP_K) -> float:
        """Add candidates to those that are known, and return the NDCG."""
        new, known = searches.candidates(validation, tried, top_k), candidates.get(tried.vocab_weight)
        candidates[tried.vocab_weight] = new if known is None else known.join(new)
        return mean_ndcg(new.items[:, :TOP_K], validation)

    def weighted(vocab_weight: float, weights: Sequence[float]) -> Fusion:
        return dataclasses.replace(fusion, **dict(zip(WEIGHTS, (vocab_weight, *weights))))

    popularity, neighbours = args.popularity_weights, args.neighbour_weights
    new = args.new_item_weights if fusion.is_new.any() else [0.0]
    starts = {
        (popularity[len(popularity) // 2], neighbours[len(neighbours) // 2], 0.0): args.num_candidates,
        (0.0, 0.0, new[-1]): args.num_candidates,
        (0.0, 0.0, 0.0): TOP_K,
    }
    for vocab_weight, (weights, num_candidates) in itertools.product(args.vocab_weights, starts.items()):
        search(weighted(vocab_weight, weights), min(max(num_candidates, TOP_K), len(searches.available)))
    rows = {"vocab-weight": ((), (), ()), "with-popularity": (popularity, (), ())}
    if len(new) > 1:
        rows["with-new-items"] = popularity, (), new
    rows["fused"] = popularity, neighbours, new
    best, chosen = fusion, {}
    for name, grids in rows.items():
        tried = {best: search(best)}
        for _ in range(3):
            found = weighted(*choose_weights(candidates, targets, grids, TOP_K)[:2])
            tried[found] = search(found)
        best = chosen[name] = max(tried, key=tried.get)  # of equal ones the first, which is the simplest
    return chosen


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


def describe(args: FuseArguments, chosen: dict[str, float], num_users: int, tested: dict[str, Ranking]) -> list[str]:
    """What was chosen on validation, which weights are the first or the last tried, and which rows are not exact."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in chosen.items())
    lines = [f"Chosen on {num_users} validation users, so that the values there are too high: {values}"]
    for name in WEIGHTS:
        tried = getattr(args, f"{name}s")
        if chosen[name] == 0:
            lines.append(f"{name} is 0: no other weight was better on validation.")
        elif chosen[name] in (tried[0], tried[-1]):
            lines.append(f"{name} is at the end of the values tried: try others beyond it by --{name}s.")
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
            validated = report["validation"][name][f"ndcg@{TOP_K}"]
            metrics = {**ranking.metrics, f"validation_ndcg@{TOP_K}": validated}
            metrics |= report if name == "fused" else {}
            place = folder if name == "fused" else folder / name
            write_results(place, metrics, task.catalog, targets, ranking.items, ranking.target_ranks, data.seen_items)


run = command(main)


if __name__ == "__main__":
    run()
