# SPDX-License-Identifier: Apache-2.0
"""
Recommend items to the users of a file, with a model that carries its catalogue.

```bash
accelerate launch -m trl_msl.scripts.recommend --model_name_or_path outputs/quickstart/msl \
    --users users.parquet --output recommendations.parquet
```

`users` is a Parquet or CSV file with a column `item_ids`: the history of each user, oldest item first, as ids or
texts, in a list or in JSON. Other columns, such as `user_id`, are kept; `recommended_ids`, `recommended_texts`,
`scores` and `exact` are added. The output is made in parts: a killed run resumes where it was, on any number of
processes, if options, users and model are still the same.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from trl import ModelConfig

from ..data import ItemCatalog, read_table
from ..recommender import Recommender
from .command_line import command
from .loading import model_options
from .outputs import finish, write_json, write_parquet


logger = logging.getLogger(__name__)

ADDED = {"recommended_ids", "recommended_texts", "scores", "exact"}


@dataclass
class RecommendArguments:
    """
    Arguments of this command, besides those of the model.

    Parameters:
        users (`str`):
            Parquet or CSV file with a column `item_ids`.
        output (`str`, *optional*, defaults to `"recommendations.parquet"`):
            Parquet file to write.
        top_k (`int`, *optional*, defaults to `10`):
            Number of items to recommend.
        exclude_history (`bool`, *optional*, defaults to `True`):
            Whether to leave out the items of a user's history.
        unknown_items (`str`, *optional*, defaults to `"error"`):
            What to do with items of a history that are not in the catalogue: `error`, or `drop`, which also drops
            users who have no others, and reports the numbers.
        part_size (`int`, *optional*, defaults to `1000`):
            Users of a part. A killed run loses the part at work.
        batch_size (`int`, *optional*, defaults to `16`):
            Users per process that are decoded at a time.
    """

    users: str = field(metadata={"help": "Parquet or CSV file with a column `item_ids`."})
    output: str = field(default="recommendations.parquet", metadata={"help": "Parquet file to write."})
    top_k: int = field(default=10, metadata={"help": "Number of items to recommend."})
    exclude_history: bool = field(default=True, metadata={"help": "Leave out the items of the history."})
    unknown_items: str = field(
        default="error", metadata={"help": "Items that are not in the catalogue.", "choices": ["error", "drop"]}
    )
    part_size: int = field(default=1000, metadata={"help": "Users of a part."})
    batch_size: int = field(default=16, metadata={"help": "Users per process decoded at a time."})


def main(args: RecommendArguments, model_args: ModelConfig) -> None:
    if args.part_size < 1:
        raise ValueError(f"`part_size` is {args.part_size}: it must be at least 1.")
    process = PartialState(cpu=not torch.accelerator.is_available())
    users = read_users(args.users, may_be_empty=args.unknown_items == "drop")
    recommender = Recommender.from_pretrained(model_args.model_name_or_path, **model_options(model_args))
    recommender.model.to(process.device)
    catalog = recommender.task.catalog
    users, report = drop_unknown(users, catalog) if args.unknown_items == "drop" else (users, "")
    process.print(f"{len(users):,} users, {len(catalog):,} items{report}")

    folder = Path(f"{args.output}.parts")
    job = {**asdict(args), **asdict(model_args), **fingerprints(recommender, args.users)}
    with process.main_process_first():
        check_job(folder, job)
    parts = {
        folder / f"{start:012}.parquet": users.iloc[start : start + args.part_size]
        for start in range(0, len(users), args.part_size)
    }
    missing = [path for path, part in parts.items() if not is_complete(path, part)]
    process.wait_for_everyone()  # all must see the same parts missing before one writes any
    for path in tqdm(missing, desc="Parts", initial=len(parts) - len(missing), total=len(parts),
                     disable=not process.is_main_process):  # fmt: skip
        found = recommender.recommend(
            parts[path]["item_ids"].tolist(), args.top_k, args.exclude_history, batch_size=args.batch_size
        )  # each process decodes a share, and has the whole result
        if process.is_main_process:
            write_parquet(path, parts[path].assign(
                recommended_ids=found.ids, recommended_texts=found.texts, scores=found.scores, exact=found.exact
            ))  # fmt: skip
    if process.is_main_process:
        write_parquet(Path(args.output), pd.concat(map(pd.read_parquet, parts), ignore_index=True))
        shutil.rmtree(folder)
        print(args.output)
    finish()


def read_users(path: str, may_be_empty: bool = False) -> pd.DataFrame:
    """The file with `item_ids` as lists of strings. Other columns of a CSV file stay strings."""
    if not path.endswith((".csv", ".parquet")):
        raise ValueError(f"`users` = {path!r} must be a .csv or .parquet file.")
    users, _ = read_table(path, ["item_ids"])
    if taken := sorted(ADDED & set(users.columns)):
        raise ValueError(f"`users` = {path!r} has the columns {taken}, which this command adds: rename them.")
    lists = [parse_history(cell) for cell in users["item_ids"]]
    wrong = [row for row, items in enumerate(lists) if items is None or not (items or may_be_empty)]
    if wrong:
        raise ValueError(
            f"`users` = {path!r}: `item_ids` must hold lists of ids or texts, or such lists as JSON, but {len(wrong)} "
            f"of {len(users)} rows do not (the first: {wrong[:5]}, with "
            f"{repr(users['item_ids'].iloc[wrong[0]])[:200]}). Correct them, or leave these users out."
        )
    return users.assign(item_ids=lists)


def parse_history(cell: object) -> list[str] | None:
    """The items of a list, or of a list as JSON; `None` if it is not a list of ids or texts."""
    try:
        items = json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        return None
    items = items.tolist() if isinstance(items, np.ndarray) else items
    # Not floats: pandas turns integers into floats where one is missing, and the id 12.0 is not 12
    if not isinstance(items, list) or any(isinstance(i, bool) or not isinstance(i, str | int) for i in items):
        return None
    return [str(item) for item in items]


def drop_unknown(users: pd.DataFrame, catalog: ItemCatalog) -> tuple[pd.DataFrame, str]:
    """The users without unknown items, if they have others; and what was dropped, in words."""
    items = {item for history in users["item_ids"] for item in history}
    # All ids or all texts: an unknown id may be the title of another item, such as 1984
    known = max(catalog.index_of_id.keys(), set(catalog.texts), key=lambda names: len(items & names))
    kept = [[item for item in items if item in known] for items in users["item_ids"]]
    num_items = sum(map(len, users["item_ids"])) - sum(map(len, kept))
    num_users = sum(len(items) == 0 for items in kept)
    if num_users == len(users):
        raise ValueError(
            f"`unknown_items` = 'drop' leaves none of the {num_users:,} users: none of their items is in the "
            f"catalogue, such as {users['item_ids'].iloc[0][:3]}. Pass ids or texts of this model's catalogue."
        )
    kept = users.assign(item_ids=kept)[[len(items) > 0 for items in kept]]
    return kept, f" ({num_items:,} unknown items were dropped, and {num_users:,} users without any other)"


def fingerprints(recommender: Recommender, users: str) -> dict[str, str]:
    """
    SHA-256 of what the recommendations depend on: the file of users, the weights, and the task. The weights are those
    in memory, which include an adapter's base model and the current state of a branch on the Hub.
    """
    weights, task = hashlib.sha256(), recommender.task
    for name, value in sorted(recommender.model.state_dict().items()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    ranked = [task.catalog.ids, task.catalog.completions, asdict(task.prompt_template), task.max_length]
    ranked += [task.decoding, sorted(task.withdrawn), task.fingerprint()]
    return {
        "users_sha256": hashlib.sha256(Path(users).read_bytes()).hexdigest(),
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
            "beginning, or pass another `output`."
        )


def is_complete(path: Path, users: pd.DataFrame) -> bool:
    """Whether a part is complete, and of these users."""
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
