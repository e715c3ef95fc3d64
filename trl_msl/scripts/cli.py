# SPDX-License-Identifier: Apache-2.0
"""
`trl-msl <command> [options]`. Only the module of the chosen command is imported, so that `--help` is fast.

On several GPUs, or with an `accelerate` config, launch the module: `accelerate launch -m trl_msl.scripts.train`.
"""

import difflib
import importlib
import sys

from .console import one_line_errors


COMMANDS = {
    "quickstart": ("trl_msl.experiments.quickstart", "Compare losses on generated data, offline, in a few minutes"),
    "semantic-ids": ("trl_msl.scripts.semantic_ids", "Write items as semantic ids, and give a model tokens for them"),
    "doctor": ("trl_msl.scripts.doctor", "Check data, tokenizer and model before training"),
    "train": ("trl_msl.scripts.train", "Fine-tune a model with the masked softmax loss, and evaluate it"),
    "dpo": ("trl_msl.scripts.dpo", "Train a recommender further by softmax DPO, and evaluate it"),
    "preferences": ("trl_msl.scripts.preferences", "Write preference rows, also for TRL's own DPO script"),
    "evaluate": ("trl_msl.scripts.evaluate", "Evaluate a trained model, by one or several ways of decoding"),
    "fuse": ("trl_msl.scripts.fuse", "Fuse a trained model with popularity and item-kNN, or other scores"),
    "recommend": ("trl_msl.scripts.recommend", "Recommend items to the users of a file"),
    "update-catalog": ("trl_msl.scripts.update_catalog", "Add and withdraw items of a trained model"),
    "merge": ("trl_msl.scripts.merge", "Merge an adapter into its base model"),
    "baselines": ("trl_msl.scripts.baselines", "Train SASRec, BERT4Rec, item-kNN or popularity on the same data"),
    "distill": (
        "trl_msl.scripts.distill",
        "Distil a trained model into SASRec, which is much faster",
    ),
    "report": ("trl_msl.scripts.report", "Compare evaluated systems: a table with paired tests, and plots"),
}


def main(arguments: list[str] | None = None) -> int | None:
    """Run the command that the first argument names, with the others as its options; return its exit code."""
    name, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        with one_line_errors():
            print(usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        print(f"trl-msl: error: {name!r} is not a command{hint} See trl-msl --help.", file=sys.stderr)
        return 2
    sys.argv = [f"trl-msl {name}", *options]
    with one_line_errors("--debug" in options):  # the import takes seconds, in which Ctrl-C may come
        module = importlib.import_module(COMMANDS[name][0])
    return module.run()


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    end = "`trl-msl <command> --help` lists the options of a command; --config takes them from a YAML file."
    return "\n".join(["usage: trl-msl <command> [options]\n\ncommands:", *lines, "", end])


if __name__ == "__main__":
    sys.exit(main())
