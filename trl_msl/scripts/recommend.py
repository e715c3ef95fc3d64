# SPDX-License-Identifier: Apache-2.0
"""
Recommend items to the users of a file or of an interaction log, with a model that carries its catalogue.

```bash
accelerate launch -m trl_msl.scripts.recommend --model_name_or_path outputs/quickstart/msl \
    --users users.parquet --output recommendations.parquet
trl-msl recommend --model_name_or_path outputs/mine --interactions log.csv --output recommendations.csv
```

`users` is a CSV, TSV, JSON lines or Parquet file with a column `item_ids`: the history of each user, oldest item
first. A cell that begins with `[` is a list of ids or texts, in JSON or Python syntax; any other holds ids, separated
by commas or spaces. With `interactions` the histories come from the log, and `users` may be a file of user ids.

`recommended_ids`, `recommended_texts`, `scores` and `exact` are added to the columns of `users`. Ids of users and
items are strings in the output. A killed run resumes where it was, on any number of processes, if options, users and
model are the same.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from trl import ModelConfig

from ..data import RankingTask
from ..model import get_item_vectors
from ..recommender import Recommender
from .command_line import command
from .loading import model_options
from .outputs import TABLE_FORMATS, finish, write_json, write_parquet, write_table
from .users import ADDED, UserArguments, check_items, read_users


logger = logging.getLogger(__name__)


@dataclass
class RecommendArguments(UserArguments):
    """
    Arguments of this command, besides those of the model.

    Parameters:
        output (`str`, *optional*, defaults to `"recommendations.parquet"`):
            File to write: `.csv`, in which lists are JSON, `.jsonl` or `.parquet`.
        top_k (`int`, *optional*, defaults to `10`):
            Number of items to recommend.
        exclude_history (`bool`, *optional*, defaults to `True`):
            Whether to leave out the items of a user's history.
        max_expansions (`int`, *optional*):
            As for [`TrieDecoder.search`]. Defaults to the task's, or 1,024.
        part_size (`int`, *optional*, defaults to `1000`):
            Number of users per part. A killed run loses at most one part.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of users decoded at a time by each process.
    """

    output: str = field(default="recommendations.parquet", metadata={"help": "A .csv, .jsonl or .parquet file."})
    top_k: int = field(default=10, metadata={"help": "Number of items to recommend."})
    exclude_history: bool = field(default=True, metadata={"help": "Leave out the items of the history."})
    max_expansions: int | None = field(
        default=None, metadata={"help": "Most search steps per user. 1,024 by default."}
    )
    part_size: int = field(default=1000, metadata={"help": "Number of users per part."})
    batch_size: int = field(default=16, metadata={"help": "Users decoded at a time by each process."})


def main(args: RecommendArguments, model_args: ModelConfig) -> None:
    check_arguments(args)
    process = PartialState(cpu=not torch.accelerator.is_available())
    users, only_ids = read_users(args)
    recommender = Recommender.from_pretrained(model_args.model_name_or_path, **model_options(model_args))
    recommender.model.to(process.device)
    catalog = recommender.task.catalog
    if args.top_k > len(catalog):
        raise ValueError(f"`top_k` is {args.top_k}: it must lie between 1 and the number of items, {len(catalog)}.")
    if args.popular_without_history and recommender.fusion is None:
        raise ValueError("`popular_without_history` is True, but the model has no fusion with counts: pass False.")
    users, report = check_items(users, only_ids, catalog, args)
    logger.info("%s users, %s items%s", f"{len(users):,}", f"{len(catalog):,}", report)

    folder = Path(f"{args.output}.parts")
    job = {**asdict(args), **asdict(model_args), **fingerprints(recommender, users, args)}
    with process.main_process_first():
        check_job(folder, job)
    parts = {
        folder / f"{start:012}.parquet": users.iloc[start : start + args.part_size]
        for start in range(0, len(users), args.part_size)
    }
    missing = [path for path, part in parts.items() if not is_complete(path, part)]
    if len(missing) < len(parts):
        logger.info("%d of %d parts are done already.", len(parts) - len(missing), len(parts))
    options = {"batch_size": args.batch_size, "popular_without_history": args.popular_without_history}
    if args.max_expansions is not None:
        options["max_expansions"] = args.max_expansions
    process.wait_for_everyone()  # all must see the same parts missing before one writes any
    with silent("trl_msl.decoding"):  # it would warn in each part of what is reported once for all users below
        for path in tqdm(missing, desc="Parts", initial=len(parts) - len(missing), total=len(parts),
                         disable=not process.is_main_process):  # fmt: skip
            histories = parts[path]["item_ids"].tolist()
            # Each process decodes a share, and has the whole result
            found = recommender.recommend(histories, args.top_k, args.exclude_history, **options)
            if process.is_main_process:
                write_parquet(path, parts[path].assign(
                    recommended_ids=found.ids, recommended_texts=found.texts, scores=found.scores, exact=found.exact
                ))  # fmt: skip
    if process.is_main_process:
        found = pd.concat(map(pd.read_parquet, parts), ignore_index=True)
        report_shortcomings(found, args.top_k, is_exact=recommender.task.decoding.get("mode") != "beam")
        write_table(Path(args.output), found)
        shutil.rmtree(folder)
        print(args.output)
    finish()


def check_arguments(args: RecommendArguments) -> None:
    """Raise a `ValueError` for an option whose error would otherwise come after some work."""
    for name in ("top_k", "max_expansions", "part_size", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}: it must be at least 1.")
    if Path(args.output).suffix not in TABLE_FORMATS:
        raise ValueError(f"`output` is {args.output!r}: its name must end in {', '.join(TABLE_FORMATS)}.")


@contextmanager
def silent(name: str) -> Iterator[None]:
    """Mute the warnings of a logger."""
    muted = logging.getLogger(name)
    level = muted.level
    muted.setLevel(logging.ERROR)
    try:
        yield
    finally:
        muted.setLevel(level)


def report_shortcomings(found: pd.DataFrame, top_k: int, is_exact: bool) -> None:
    """Warn if some users got too few items, or items that may not be the best."""
    if num_short := int((found["recommended_ids"].map(len) < top_k).sum()):
        logger.warning(
            "%d of %d users got fewer than `top_k` items: no others were left to recommend.", num_short, len(found)
        )
    num_inexact = int((~found["exact"]).sum())
    if is_exact and num_inexact:
        logger.warning(
            "%d of %d users reached `max_expansions` before their items were certain to be the best: raise it.",
            num_inexact, len(found),
        )  # fmt: skip


def fingerprints(recommender: Recommender, users: pd.DataFrame, args: RecommendArguments) -> dict[str, str]:
    """
    SHA-256 of what the recommendations depend on: the users (histories and file), the weights, the task and the
    fusion.
    """
    read = [users[name].tolist() for name in (args.user_column, "item_ids") if name in users.columns]
    file = Path(args.users).read_bytes() if args.users and Path(args.users).is_file() else b""
    return {
        "users_sha256": hashlib.sha256(json.dumps(read).encode() + file).hexdigest(),
        **model_fingerprints(recommender.model, recommender.task),
        "fusion_sha256": recommender.fusion.fingerprint() if recommender.fusion else "",
    }


def model_fingerprints(model: PreTrainedModel, task: RankingTask) -> dict[str, str]:
    """
    SHA-256 of weights and task. The weights are those in memory: they include an adapter's base model, and follow a
    branch on the Hub.
    """
    weights = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if (vectors := get_item_vectors(model)) is not None:
        weights.update(vectors.fingerprint().encode())
    ranked = [task.catalog.ids, task.catalog.completions, asdict(task.prompt_template), task.max_length]
    ranked += [task.decoding, sorted(task.withdrawn), task.fingerprint()]
    return {
        "weights_sha256": weights.hexdigest(),
        "task_sha256": hashlib.sha256(json.dumps(ranked).encode()).hexdigest(),
    }


def check_job(folder: Path, job: dict) -> None:
    """Raise a `ValueError` if the parts in `folder` come from another job."""
    job, path = json.loads(json.dumps(job)), folder / "job.json"
    if not path.exists():
        write_json(path, job)
    elif (before := json.loads(path.read_text(encoding="utf-8"))) != job:
        changed = [name for name in job if before.get(name) != job[name]]
        raise ValueError(
            f"{folder} holds parts of a run that differs in {', '.join(changed)}: remove the folder to start from the "
            "beginning, or write elsewhere."
        )


def is_complete(path: Path, users: pd.DataFrame) -> bool:
    """Whether a part is complete and belongs to these users."""
    if not path.exists():
        return False
    try:
        found = pd.read_parquet(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        logger.warning("%s cannot be read and is made again (%s).", path, error)
        return False
    histories = [list(items) for items in found["item_ids"]] if set(found.columns) >= ADDED else None
    return histories == users["item_ids"].tolist()


run = command(main)


if __name__ == "__main__":
    run()
