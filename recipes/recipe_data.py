# SPDX-License-Identifier: Apache-2.0
"""Data that recipes read: a folder, an interaction log, or, without arguments, a generated one."""

from dataclasses import dataclass

from datasets import DatasetDict
from synthetic import best_possible, generate_catalog, generate_transitions, generate_windows

from trl_msl import DataArguments, ItemCatalog, PromptTemplate, build_rows, read_data


@dataclass
class RecipeData:
    """Catalogue, prompt template, rows by split, and the best possible test metrics where they are known."""

    catalog: ItemCatalog
    template: PromptTemplate
    rows: DatasetDict
    best_possible: dict[str, float] | None


def load_recipe_data(args: DataArguments) -> RecipeData:
    """Read what `args` name, or generate data."""
    best = None
    if args.data_dir or args.interactions:
        catalog, windows = read_data(args)
    else:
        titles = generate_catalog()
        catalog = ItemCatalog.from_dict(titles, template=args.item_template)
        transitions = generate_transitions(titles)
        windows = generate_windows(transitions)
    for split, most in (("validation", args.max_validation_users), ("test", args.max_test_users)):
        if most is not None:
            windows[split] = windows[split].select(range(min(most, len(windows[split]))))
    if not (args.data_dir or args.interactions):
        best = best_possible(transitions, windows["test"])
    template = args.prompt_template
    rows = DatasetDict({split: build_rows(windows[split], catalog, template) for split in windows})
    return RecipeData(catalog, template, rows, best)
