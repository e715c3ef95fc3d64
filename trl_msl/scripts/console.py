# SPDX-License-Identifier: Apache-2.0
"""What a command says on stderr: log lines, and errors in one line; and its exit codes."""

import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from tqdm import tqdm


# Before the process group exists, and without importing torch
RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))


@contextmanager
def one_line_errors(debug: bool = False, options: Collection[str] = ()) -> Iterator[None]:
    """
    End the process with one line on stderr and exit code 2 at a `ValueError` or `OSError`, with 130 at Ctrl-C, and
    without a word when the reader of stdout has left, as in `| head`. With `debug`, exceptions pass through.
    """
    try:
        yield
        sys.stdout.flush()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if debug:
            raise
        program = os.path.basename(sys.argv[0])
        if isinstance(error, KeyboardInterrupt):
            _leave(130, f"{program}: {str(error) or 'stopped'}")
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            _leave(141)
        _leave(2, f"{program}: error: {name_options(_describe(error), options)}")


def _describe(error: Exception) -> str:
    """The message in one line, that of the operating system with the file first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _leave(code: int, line: str = "") -> None:
    if RANK:  # if the main process fails for the same reason, the launcher ends this one before it says so again
        time.sleep(2)
    if line:
        print(line, file=sys.stderr, flush=True)
    if WORLD_SIZE > 1:  # not by `sys.exit`: tearing down the process group may wait for the others
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


QUOTES = "'\""
# `name`, `name` = value, `name=value` or name=value, but not the argument of a call such as f(name=value)
VALUE = r"""'[^']*'|"[^"]*"|[\w+-]+(?:\.\w+)?"""
ARGUMENTS = [
    re.compile(rf"`(?P<name>\w+)`(?: = (?P<value>{VALUE}))?"),
    re.compile(rf"(?<!\w\()(?<![\w.`-])(?P<tick>`?)(?P<name>\w+)=(?P<value>{VALUE})(?P=tick)"),
]


def name_options(message: str, options: Collection[str]) -> str:
    """
    A message about Python arguments, with those that are options of the command written as options.

    ```python
    >>> name_options("`max_length` is 5: consider html_entities='decode' (of `task`)", ["max_length", "html_entities"])
    '--max_length is 5: consider --html_entities decode (of `task`)'
    >>> name_options("consider drop_duplicates=True", ["drop_duplicates"])
    'consider --drop_duplicates true'

    ```
    """

    def write(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        if name not in options:
            return match[0]
        if value is None:
            return f"--{name}"
        value = value.lower() if value in ("True", "False") else shlex.quote(value.strip(QUOTES))
        return f"--{name} {value}"

    for pattern in ARGUMENTS:
        message = pattern.sub(write, message)
    return message


# TRL and PEFT still use these names
OLD_NAMES = r"`(is_)?gradient_checkpointing\w*` is deprecated"
# The trainer says so when it gives the model the special tokens of its tokenizer
ALIGNED = "The tokenizer has new PAD/BOS/EOS tokens"
# Of DeepSpeed where it is installed; what a training runs on is in its first lines
NO_ACCELERATOR = "Setting accelerator to CPU"


class _BesideBars(logging.StreamHandler):
    """Writes lines above the progress bars and not into them."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


@contextmanager
def log_lines(options: Collection[str] = ()) -> Iterator[None]:
    """
    Show the package's log from level INFO on as lines on stderr, each once, and on other processes than the main one
    only errors. Messages of libraries that come in every run and that nobody can act on are left out.
    """
    logger, handler, shown = logging.getLogger("trl_msl"), _BesideBars(), set()

    def write(record: logging.LogRecord) -> str:
        return name_options(logging.Formatter().format(record), options)

    def is_new(record: logging.LogRecord) -> bool:
        line, count = write(record), len(shown)
        shown.add(line)
        return len(shown) > count

    def is_of_use(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in (ALIGNED, NO_ACCELERATOR))

    handler.format = write
    handler.addFilter(is_new)
    # DeepSpeed's logger writes to stdout, where the results of commands are
    foreign = [*logging.getLogger("transformers").handlers, logging.getLogger("DeepSpeed")]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR if RANK else logging.INFO)
    logger.propagate = False
    for other in foreign:
        other.addFilter(is_of_use)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", OLD_NAMES, FutureWarning)
            yield
    finally:
        for other in foreign:
            other.removeFilter(is_of_use)
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
