# SPDX-License-Identifier: Apache-2.0
"""The model card of a model that carries its catalogue."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from transformers import Trainer, is_wandb_available
from trl.trainer.utils import get_comet_experiment_url, get_config_model_id, get_trackio_space_url

from .resuming import ADAPTER_OPTIONS, base_name


_SHOWN = (
    "temperature", "normalize", "beta", "learning_rate", "lr_scheduler_type", "batch_size", "precision", "seed",
    *ADAPTER_OPTIONS,
)  # fmt: skip
_PACKAGES = ("trl_msl", "trl", "transformers", "peft", "torch", "datasets", "tokenizers")
_TRL_CITATION = """\
    @software{vonwerra2020trl,
      title   = {{TRL: Transformers Reinforcement Learning}},
      author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
      license = {Apache-2.0},
      url     = {https://github.com/huggingface/trl},
      year    = {2020}
    }"""  # fmt: skip # noqa: E501


def make_model_card(
    trainer: Trainer,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> ModelCard:
    """
    The card of the model of a trainer of this package: a usage example, its data, ranking metrics and how it was
    trained. What is not known is left out. Other arguments are those of [`~transformers.Trainer.create_model_card`].
    """
    args, task, paper, rows = trainer.args, trainer.task, trainer._paper, trainer.train_dataset
    base, base_path = base_name(trainer.model), get_config_model_id(trainer.model.config) or ""
    is_published = bool(base) and not Path(base_path).is_dir()
    # A path of this machine means nothing elsewhere, and may hold a user's name
    folder = Path(args.output_dir).name if Path(args.output_dir).is_absolute() else args.output_dir
    model_id = trainer.hub_model_id or args.hub_model_id or folder
    metadata = ModelCardData(
        base_model=base if is_published else None,
        datasets=dataset_name,
        library_name="transformers",
        license=_license(base_path, args.push_to_hub),
        model_name=model_name or Path(model_id).name,
        tags=_tags([*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])]),
    )
    split, metrics = ("test", trainer.test_metrics) if trainer.test_metrics else ("validation", _validated(trainer))
    # Without intervals, `validation_...`, and those of warm and cold targets
    measured = [name for name in metrics if "@" in name and "_" not in name] if "num_rows" in metrics else []
    if measured:
        metadata.eval_results = [_result(name, metrics[name], split, dataset_name) for name in measured]
    origin = f", fine-tuned from {f'[{base}](https://huggingface.co/{base})' if is_published else f'`{base}`'}"
    num_rows = f" and {len(rows):,} training rows" if isinstance(rows, Dataset) else ""
    dataset = f" of [{dataset_name}](https://huggingface.co/datasets/{dataset_name})" if dataset_name else ""
    history = ", ".join(repr(item) for item in task.catalog.ids[:2])
    sections = [
        f"# Model Card for {metadata.model_name}",
        f"A recommender{origin if base else ''} with [TRL](https://github.com/huggingface/trl) and `trl_msl`.",
        "## Quick start\n\n```python\nfrom trl_msl import Recommender\n\n"
        f"recommender = Recommender.from_pretrained({model_id!r})\n"
        f"found = recommender.recommend([[{history}]], k=10)  # ids or texts of a user's items, oldest first\n"
        "for text, score in zip(found.texts[0], found.scores[0]):\n    print(f'{score:8.2f}  {text}')\n```",
        "## What it recommends\n\nItems of the catalogue that is saved with it, and nothing else, ranked by their "
        "log-probability among the tokens that continue some item.",
        f"## Data\n\nTrained on a catalogue of {task.num_trained or len(task.catalog):,} items (at most "
        f"{task.trie.depth} tokens each){num_rows}{dataset}.",
        *([_evaluation(measured, metrics, split)] if measured else []),
        "## Training procedure",
        *_runs(),
        f"Trained with {trainer._name}, introduced in [{paper['title']}](https://huggingface.co/papers/{paper['id']})"
        f", using `{type(trainer).__name__}`.",
        "### Hyperparameters\n\n" + _table(("option", "value"), _hyperparameters(trainer).items()),
        "### Framework versions\n\n" + "\n".join(f"- {name}: {version(name)}" for name in _PACKAGES),
        "## Citations",
        f"Cite {trainer._name} as:\n\n```bibtex\n{dedent(paper['citation'])}\n```",
        f"Cite TRL as:\n\n```bibtex\n{dedent(_TRL_CITATION)}\n```",
    ]
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n")


def _validated(trainer: Trainer) -> dict[str, float]:
    """Ranking metrics of the validation that chose the model, or of the last one; empty if there was none."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_num_rows" in entry]
    best = [entry for entry in evaluations if entry["step"] == trainer.state.best_global_step]
    return {name.removeprefix("eval_"): value for name, value in (best or evaluations or [{}])[-1].items()}


def _hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """What was trained with: the usual options, others that are not at their defaults, and how long."""
    default = {field.name: field.default for field in dataclasses.fields(trainer.args)}
    shown = {
        name: value
        for name, value in trainer.record.items()
        if value not in (None, False, "none", [])
        and (name in _SHOWN or value != default.get(name, value))
        and name not in ("num_train_epochs", "max_steps")  # what was done says more
    }
    state = trainer.state
    return {**shown, "steps": state.global_step, "epochs": round(state.epoch or 0, 2)} if state.global_step else shown


def _result(name: str, value: float, split: str, dataset: str | None) -> EvalResult:
    """An entry of the metadata's `model-index`, which must name a dataset."""
    return EvalResult(
        task_type="recommendation",
        dataset_type=dataset or "interactions",
        dataset_name=dataset or "interactions",
        dataset_split=split,
        metric_type=name,
        metric_value=value,
    )


def _evaluation(measured: list[str], metrics: dict[str, float], split: str) -> str:
    head, rows, groups = ["metric", "value", "95% interval"], [], []
    text = f"## Evaluation\n\nOn {metrics['num_rows']:,} {split} rows, ranking the whole catalogue"
    if metrics.get("num_cold"):
        groups = ["warm", "cold"]
        text += f"; warm are the {metrics['num_warm']:,} whose item is in the training rows, cold the others"
    for name in measured:
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        cells = [metrics[name], *(metrics.get(f"{name}_{group}") for group in groups)]
        value, *others = ("-" if cell is None else f"{cell:.4f}" for cell in cells)
        rows.append((name, value, "-" if low is None else f"{low:.4f} to {high:.4f}", *others))
    return f"{text}:\n\n{_table((*head, *groups), rows)}"


def _table(head: tuple[str, ...], rows: Iterable[tuple]) -> str:
    """A table in Markdown; a list is written as its elements."""
    cells = ([", ".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))


def _runs() -> list[str]:
    """Links to the run in each active tracker."""
    urls = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        urls["Weights & Biases"] = wandb.run and wandb.run.url
    return [f"The run in {name}: [{url}]({url})" for name, url in urls.items() if url]


def _tags(tags: list[str]) -> list[str]:
    """Tags of a model, completed as TRL does."""
    if "JOB_ID" in os.environ:
        tags = [*tags, "hf_jobs"]
    if url := get_trackio_space_url():  # replaces the tag without the run's address
        tags = [*(tag for tag in tags if not tag.startswith("trackio:")), f"trackio:{url}"]
    return sorted({"generated_from_trainer", *tags})


def _license(base: str, download: bool) -> str | None:
    """License of a model, from its card: in its folder, in the cache, or, with `download`, on the Hub."""
    if not base:
        return None
    path = Path(base) / "README.md"
    if not Path(base).is_dir():
        try:
            path = Path(hf_hub_download(base, "README.md", local_files_only=not download))
        except (OSError, ValueError):  # no such repository or file, no network
            return None
    if not path.is_file():
        return None
    return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
