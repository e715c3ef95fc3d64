# SPDX-License-Identifier: Apache-2.0
"""The options of a command: read from a command line and a YAML file, and listed by `--help`."""

import argparse
import dataclasses
import difflib
import importlib
import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from ..data import DataArguments
from .cli import COMMANDS
from .console import name_options


logger = logging.getLogger(__name__)

USUAL = (
    "output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
    "load_best_model_at_end", "metric_for_best_model", "resume_from_checkpoint", "logging_steps", "report_to", "bf16",
    "use_cpu", "seed", "push_to_hub", "hub_model_id",
)  # fmt: skip
GROUPS = ("data", "this command", "loss", "model", "training", "all other options of the trainer")
CONFIG_OPTIONS = """\
  --config FILE         Take options from a YAML file; those of the command line count more.
  --debug               Show the traceback of an error."""


class OptionParser(TrlParser):
    """
    Parser of the options of a command: the fields of the dataclasses that annotate the parameters of `main`.

    Args:
        main (`Callable`):
            The command.
        doc (`str`):
            Docstring of the command's module: the start and the end of the help.

    Raises:
        `ValueError`: at options that are unknown, missing or of another kind.
    """

    def __init__(self, main: Callable[..., Any], doc: str):
        kinds = [kind for name, kind in get_type_hints(main).items() if name != "return"]
        start, _, end = doc.partition("\n\n")
        end = re.sub(r"^```bash\n(.*?)^```$", _indent, end, flags=re.DOTALL | re.MULTILINE)
        super().__init__(
            kinds, usage="%(prog)s [options]", description=start.strip(), epilog=end.strip("\n"), allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )  # fmt: skip
        self.names = self.known = {action.dest for action in self._actions}
        for action in self._actions:
            action.help = name_options(action.help or "", self.names)

    def parse(self, arguments: list[str], config: Path | None = None) -> tuple[Any, ...]:
        """The dataclasses, filled from `arguments`, from the file after `--config` and, before it, from `config`."""
        if config is not None:
            self.set_defaults_with_config(**yaml.safe_load(config.read_text(encoding="utf-8")))
        try:
            return self.parse_args_and_config(_separate_config(arguments))
        except yaml.YAMLError as error:
            raise ValueError(f"The file after --config can't be read: {error}") from error

    def parse_known_args(self, args: list[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        namespace, rest = super().parse_known_args(args, namespace)
        unknown = [part.split("=")[0] for part in rest if part.startswith("--")]
        if rest:
            self.error(self._describe_unknown(unknown[0]) if unknown else f"{rest[0]!r} belongs to no option")
        return namespace, rest

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        if "learning_rate" not in self.names:  # a command that trains nothing
            config = self._without_training(config)
        for names in (self.known, self.names):  # a typo before an option of other commands
            if unknown := [name for name in config if name not in names]:
                self.error(self._describe_unknown(f"--{unknown[0]}"))
        for action in self._actions:
            if action.dest in config and config[action.dest] is not None:
                config[action.dest] = self._config_value(action, config[action.dest])
        return super().set_defaults_with_config(**config)

    def _without_training(self, config: dict[str, Any]) -> dict[str, Any]:
        """What this command shares with the training that the file may be for."""
        if config.keys() <= self.names:
            return config
        self.known = self.names | _training_options()
        if not config.keys() <= self.known:
            return config
        # Here they would be the base model and the folder of the training; the doctor does check the base model
        others = {"output_dir", "model_revision"}
        if ModelConfig in self.dataclass_types:
            others.add("model_name_or_path")
        left_out = [name for name in config if name in others or name not in self.names]
        logger.info("Options of a training, which this command leaves out: %s.", ", ".join(left_out))
        return {name: value for name, value in config.items() if name not in left_out}

    def _config_value(self, action: argparse.Action, value: Any) -> Any:
        """A value of a YAML file, in a list where the option takes several."""
        if value is False and "no" in (action.choices or ()):
            value = "no"  # YAML takes it for a boolean
        values = value if isinstance(value, list) else [value]
        for choice in values if action.choices else ():
            if choice not in action.choices:
                names = ", ".join(map(str, action.choices))
                self.error(f"{action.option_strings[0]} is {choice!r} in a file: choose from {names}")
        return values if action.nargs == "+" else value

    def _describe_unknown(self, option: str) -> str:
        near = difflib.get_close_matches(option, [f"--{name}" for name in self.known], n=1)
        return f"{option} is not an option of this command" + (f"; did you mean {near[0]}?" if near else "")

    def error(self, message: str) -> None:
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # one spelling of each option
        end = "" if message.endswith("?") else "."
        raise ValueError(f"{message}{end} See {self.prog} --help.")

    def format_help(self) -> str:
        """The options in groups, those of the package first and the trainer's several hundred last."""
        groups = {title: [] for title in GROUPS}
        for action in self._actions:
            if action.dest != "help":
                groups[self._group(action.dest)].append(action)
        groups["training"].sort(key=lambda action: USUAL.index(action.dest))
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, actions in groups.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(CONFIG_OPTIONS)
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _group(self, name: str) -> str:
        kind = next(kind for kind in self.dataclass_types if name in kind.__dataclass_fields__)
        if not issubclass(kind, TrainingArguments):
            return {DataArguments: "data", ModelConfig: "model"}.get(kind, "this command")
        if name in USUAL:
            return "training"
        owner = next(owner for owner in kind.__mro__ if name in inspect.get_annotations(owner))
        return "loss" if owner.__module__.startswith("trl_msl.") else GROUPS[-1]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each option by one of its spellings, and with its default if it has one."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, **{"max_help_position": 36, **kwargs})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        choices = action.choices if action.choices and len(action.choices) < 7 else ()
        value = "{" + ",".join(map(str, choices)) + "}" if choices else "VALUE"
        form = {0: "{}", "?": "{} [true|false]", "+": "{} {} ..."}.get(action.nargs, "{} {}")
        return form.format(action.option_strings[0], value)

    def _get_help_string(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._StoreFalseAction):  # has the help of the option that it negates
            return f"The same as --{action.dest} false."
        return action.help if action.default is None else super()._get_help_string(action)


def _training_options() -> set[str]:
    # By their names, as the commands import this module
    mains = [importlib.import_module(COMMANDS[name][0]).main for name in ("train", "dpo")]
    kinds = [kind for main in mains for kind in get_type_hints(main).values() if dataclasses.is_dataclass(kind)]
    return {name for kind in kinds for name in kind.__dataclass_fields__}


def _indent(code: re.Match) -> str:
    lines = re.sub(r" {4,}", " \\\\\n    ", code[1].rstrip("\n"))  # a docstring joins lines that end in a backslash
    return re.sub(r"^(?=.)", "    ", lines, flags=re.MULTILINE)


def _separate_config(arguments: list[str]) -> list[str]:
    """`--config=FILE` as two arguments, as TRL takes it."""
    parts = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if parts and parts[-1] == "--config":
        raise ValueError("--config lacks its file.")
    return parts
