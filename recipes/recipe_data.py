# SPDX-License-Identifier: Apache-2.0
"""Data that recipes read: a folder, an interaction log, or, without arguments, a generated one."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from datasets import DatasetDict

from trl_msl import DataArguments, ItemCatalog, PromptTemplate, build_rows, read_data
from trl_msl.experiments.synthetic import best_possible, generate_catalog, generate_transitions, generate_windows


QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


@dataclass
class RecipeData:
    """Catalogue, prompt template, windows and rows by split, and the best possible test metrics if they are known."""

    catalog: ItemCatalog
    template: PromptTemplate
    windows: DatasetDict
    rows: DatasetDict
    best_possible: dict[str, float] | None

    @property
    def seen_items(self) -> set[str]:
        """Ids of the items in the training windows."""
        return {item for window in self.windows["train"]["item_ids"] for item in window}


def load_recipe_data(args: DataArguments) -> RecipeData:
    """Read what `args` name, or generate data."""
    best = None
    if args.data_dir or args.interactions:
        catalog, windows = read_data(args)
    else:
        titles = generate_catalog()
        texts = list(titles) if args.item_text == "id" else list(titles.values())
        catalog = ItemCatalog(list(titles), texts, template=args.item_template)
        transitions = generate_transitions(titles)
        windows = generate_windows(transitions)
    for split, most in (("validation", args.max_validation_users), ("test", args.max_test_users)):
        if most is not None:
            windows[split] = windows[split].select(range(min(most, len(windows[split]))))
    if not (args.data_dir or args.interactions):
        best = best_possible(transitions, windows["test"])
    template = args.prompt_template
    rows = DatasetDict({split: build_rows(windows[split], catalog, template) for split in windows})
    return RecipeData(catalog, template, windows, rows, best)


def check_template(model_name_or_path: str, template: PromptTemplate) -> None:
    """Whether `template` is the one that a local model was trained with, where that is known."""
    path = Path(model_name_or_path) / "recommender.json"
    if path.is_file():
        trained = json.loads(path.read_text(encoding="utf-8"))["prompt_template"]
        given = dataclasses.asdict(template)
        if different := {name: (given[name], trained[name]) for name in trained if given[name] != trained[name]}:
            raise ValueError(
                f"The prompt differs from the one that {model_name_or_path} was trained with, in (here, there): "
                f"{different}. Pass the data options of its training: `prompt_text`, `prompt_words`, "
                "`conversational`, `separate_items`."
            )


def with_quickstart_data(arguments: list[str]) -> list[str]:
    """A command's arguments, after the quickstart's data options if they name no data of their own."""
    if {"--config", "--data_dir", "--interactions"} & {argument.split("=")[0] for argument in arguments}:
        return arguments
    names = {f.name for f in dataclasses.fields(DataArguments)}
    config = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    options = [part for name, value in config.items() if name in names for part in (f"--{name}", str(value))]
    return [*options, *arguments]
