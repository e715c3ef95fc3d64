# SPDX-License-Identifier: Apache-2.0
"""
Add items to a trained model's catalogue and withdraw others, without training.

```bash
trl-msl update-catalog --model_name_or_path outputs/quickstart/msl \
    --add new_items.csv --withdraw 17 204 --output_dir outputs/updated
```

`add` is a JSON file that maps ids to texts, or a CSV or Parquet file with columns `item_id` and `title`. All that the
model knows of a new item is the first tokens that it shares with items of the training: their number is printed, and
written to `new_items.csv`.
"""

from collections import Counter
from dataclasses import dataclass, field

import pandas as pd
from transformers import AutoTokenizer

from ..collaborative import load_fusion
from ..data import RankingTask, read_items
from ..recommender import find_folder, find_task_folder
from .command_line import command
from .derived import copy_model, new_folder, write_card
from .semantic_ids import code_new_items


@dataclass
class UpdateArguments:
    """
    Arguments of this command.

    Parameters:
        model_name_or_path (`str`):
            Folder or repository with a model or an adapter and its catalogue.
        output_dir (`str`):
            Folder to write, which must not exist.
        add (`str`, *optional*):
            Items to add.
        withdraw, restore (`list[str]`, *optional*):
            Ids of items to withdraw, and of withdrawn items to restore.
        item_column, text_column (`str`, *optional*):
            Columns of `add`.
        semantic_ids (`str`, *optional*):
            Folder that `trl-msl semantic-ids` wrote, if the model was trained on semantic ids: the new items get
            theirs from its quantiser.
        item_vectors (`str`, *optional*):
            With `semantic_ids`: vectors of the new items, if those of the others came from a file, too.
        empty_texts (`str`, *optional*):
            As for [`ItemCatalog`].
        html_entities (`str`, *optional*):
            As for [`ItemCatalog`]. Defaults to that of the training.
    """

    model_name_or_path: str = field(metadata={"help": "Folder or repository of a model with its catalogue."})
    output_dir: str = field(metadata={"help": "Folder to write, which must not exist."})
    add: str | None = field(default=None, metadata={"help": "Items to add: JSON, CSV or Parquet."})
    withdraw: list[str] = field(default_factory=list, metadata={"help": "Ids of items to withdraw."})
    restore: list[str] = field(default_factory=list, metadata={"help": "Ids of withdrawn items to restore."})
    semantic_ids: str | None = field(default=None, metadata={"help": "Folder of the semantic ids, to code new items."})
    item_vectors: str | None = field(default=None, metadata={"help": "With `semantic_ids`: vectors of the new items."})
    item_column: str = field(default="item_id", metadata={"help": "Id column of `add`."})
    text_column: str = field(default="title", metadata={"help": "Text column of `add`."})
    empty_texts: str = field(default="error", metadata={"help": "Items without text: 'error', 'keep' or 'id'."})
    html_entities: str | None = field(
        default=None, metadata={"help": "HTML entities in texts: 'keep' or 'decode'. By default as in training."}
    )

    def __post_init__(self):
        for name, needed in (("semantic_ids", "add"), ("item_vectors", "semantic_ids")):
            if getattr(self, name) and not getattr(self, needed):
                raise ValueError(f"`{name}` has no effect without `{needed}`: pass both, or leave it out.")


def main(args: UpdateArguments) -> None:
    with new_folder(args.output_dir) as updated_folder:
        folder = find_folder(args.model_name_or_path, "model_name_or_path")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # left out, it would ask
        task = RankingTask.from_pretrained(find_task_folder(folder), tokenizer)
        html_entities = args.html_entities or task.catalog.html_entities
        policies = {"empty_texts": args.empty_texts, "html_entities": html_entities}
        added = read_items(args.add, args.item_column, args.text_column, **policies) if args.add else None
        if added and args.semantic_ids:
            added = code_new_items(added, args.semantic_ids, args.item_vectors, task.catalog.texts)
        updated = task.update(added, args.withdraw, args.restore)
        copy_model(folder, updated_folder)
        if fusion := load_fusion(folder, len(task.catalog)):
            fusion.extend(len(updated.catalog)).save_pretrained(updated_folder)
        updated.save_pretrained(updated_folder)
        shared = updated.shared_prefixes()
        summary, *details = describe(updated, shared)
        note = f"The catalogue was changed after the training. It holds {summary}"
        write_card(folder, updated_folder, args.output_dir, note, has_changed=True)
        if shared:
            texts = updated.catalog.texts[updated.num_trained :]
            table = pd.DataFrame({"item_id": shared.keys(), "title": texts, "shared_tokens": shared.values()})
            table.to_csv(updated_folder / "new_items.csv", index=False)
    print("\n".join([summary, *details, args.output_dir]))


def describe(task: RankingTask, shared: dict[str, int]) -> list[str]:
    """What the catalogue holds now, and then what new items share with those of the training: lines of text."""
    total, withdrawn = len(task.catalog), len(task.withdrawn)
    lines = [
        f"{total:,} items: {task.num_trained:,} that the model was trained with, {len(shared):,} added since, "
        f"{withdrawn:,} withdrawn."
    ]
    for tokens, count in sorted(Counter(min(tokens, 3) for tokens in shared.values()).items()):
        examples = [item for item, number in shared.items() if min(number, 3) == tokens][:3]
        number = ("no token", "1 token", "2 tokens", "3 tokens or more")[tokens]
        lines.append(f"{count:>7,} share {number} with an item of the training, such as {examples}")
    if 0 in shared.values():
        lines.append("Those that share none begin with a token that the model has not learned to rank: retrain soon.")
    return lines


run = command(main)


if __name__ == "__main__":
    run()
