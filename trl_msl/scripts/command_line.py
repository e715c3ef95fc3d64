# SPDX-License-Identifier: Apache-2.0
"""From a command line to the arguments of a command's `main`; the generated data where it names no data."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from trl import TrlParser

from ..data import DataArguments


QUICKSTART = Path(__file__).with_name("quickstart.yaml")


def command(
    main: Callable[..., Any], generated_data: bool = False, model_is_optional: bool = False
) -> Callable[..., Any]:
    """
    A function that parses options, by default those of the command line, into the dataclasses that annotate the
    parameters of `main`, and calls it. With `generated_data`, options that name no data mean the quickstart's.
    """

    def run(arguments: list[str] | None = None) -> Any:
        arguments = sys.argv[1:] if arguments is None else arguments
        if generated_data:
            arguments = with_generated_data(arguments)
        kinds = [kind for name, kind in get_type_hints(main).items() if name != "return"]
        parsed = TrlParser(kinds).parse_args_and_config(arguments)
        if not model_is_optional and any(getattr(args, "model_name_or_path", "") is None for args in parsed):
            raise ValueError("`model_name_or_path` is missing: pass the folder or repository of a model.")
        return main(*parsed)

    return run


def names_data(arguments: list[str]) -> bool:
    """Whether a command line names data of its own."""
    return bool({"--config", "--data_dir", "--interactions"} & {argument.split("=")[0] for argument in arguments})


def with_generated_data(arguments: list[str]) -> list[str]:
    """The arguments, preceded by the data options of the quickstart if they name no data of their own."""
    if names_data(arguments):
        return arguments
    names = {f.name for f in dataclasses.fields(DataArguments)}
    config = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    options = [part for name, value in config.items() if name in names for part in (f"--{name}", str(value))]
    return [*options, *arguments]
