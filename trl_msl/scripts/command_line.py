# SPDX-License-Identifier: Apache-2.0
"""From a command line to the arguments of a command's `main`."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .console import log_lines, one_line_errors
from .option_parser import OptionParser


def command(
    main: Callable[..., Any], model_is_optional: bool = False, config: Path | None = None, doc: str | None = None
) -> Callable[..., Any]:
    """
    A function that parses options into the dataclasses that annotate the parameters of `main`, and calls `main`.

    Called without arguments it reads the command line, and an error ends the process in one line. Called from Python
    with a list of arguments it lets errors pass.

    Args:
        main (`Callable`):
            What the command does.
        model_is_optional (`bool`, *optional*, defaults to `False`):
            Whether `model_name_or_path` may be left out.
        config (`Path`, *optional*):
            YAML file with defaults of the options.
        doc (`str`, *optional*):
            Text for `--help`. Defaults to the docstring of the module of `main`.
    """

    def call(arguments: list[str], parser: OptionParser) -> Any:
        parsed = parser.parse(arguments, config)
        if not model_is_optional and any(getattr(args, "model_name_or_path", "") is None for args in parsed):
            raise ValueError("`model_name_or_path` is missing: pass the folder or repository of a model.")
        check_outputs(parsed)
        return main(*parsed)

    def run(arguments: list[str] | None = None) -> Any:
        parser = OptionParser(main, doc or sys.modules[main.__module__].__doc__)
        if arguments is not None:
            return call(arguments, parser)
        arguments, debug = take_debug(sys.argv[1:])
        with one_line_errors(debug, parser.names), log_lines(parser.names):
            return call(arguments, parser)

    return run


def take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--debug`, and whether it was there. With a value it is an option of the trainer."""
    for place, (name, following) in enumerate(zip(arguments, [*arguments[1:], "--"])):
        if name == "--debug" and following.startswith("--"):
            return arguments[:place] + arguments[place + 1 :], True
    return arguments, False


def check_outputs(parsed: tuple[Any, ...]) -> None:
    """Raise a `ValueError` if `output_dir` or `output` can't be written, before anything is read."""
    for name in ("output_dir", "output"):
        for path in (getattr(args, name, None) for args in parsed):
            if path is None:
                continue
            folder = Path(path) if name == "output_dir" else Path(path).parent
            existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
            try:
                with tempfile.TemporaryFile(dir=existing):
                    pass
            except OSError as error:
                raise ValueError(f"`{name}` is {str(path)!r}, which can't be written: {error.strerror}.") from error
