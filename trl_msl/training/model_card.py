# SPDX-License-Identifier: Apache-2.0
"""The model card of a model that carries its catalogue."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from transformers import is_wandb_available
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from ..data import RankingTask


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
    metadata: ModelCardData,
    task: RankingTask,
    model_id: str,
    base: str,
    trainer: str,
    method: str,
    paper: dict[str, str],
    num_rows: int | None,
    options: dict[str, Any],
    split: str,
    metrics: dict[str, float],
) -> ModelCard:
    """
    A model card with a usage example, what the model recommends, its data, ranking metrics and training procedure.
    What is not known is left out.

    Args:
        metadata ([`~huggingface_hub.ModelCardData`]):
            Head of the card; `model_name` is its title. The metrics are added.
        task ([`RankingTask`]):
            What the model ranks.
        model_id (`str`):
            Repository or folder of the model.
        base (`str`):
            Name of the model that the training began with; empty if unknown.
        trainer (`str`):
            Class that trained it.
        method, paper (`str`, `dict[str, str]`):
            Name of the training method, and `title`, `id` and `citation` of its paper.
        num_rows (`int`, *optional*):
            Number of training rows, where it is known.
        options (`dict[str, Any]`):
            What the model was trained with.
        split, metrics (`str`, `dict[str, float]`):
            What [`evaluate_recommendations`] measured, and on which rows; metrics may be empty.
    """
    published = f"[{base}](https://huggingface.co/{base})" if metadata.base_model else f"`{base}`"
    history = ", ".join(repr(item) for item in task.catalog.ids[:2])
    rows = "" if num_rows is None else f" and {num_rows:,} training rows"
    dataset = metadata.datasets and f" of [{metadata.datasets}](https://huggingface.co/datasets/{metadata.datasets})"
    ranked = [name for name in metrics if "@" in name] if "num_rows" in metrics else []
    measured = [name for name in ranked if not name.startswith("validation") and not name.endswith(("_low", "_high"))]
    if measured:
        metadata.eval_results = [_result(name, metrics[name], split, metadata.datasets) for name in measured]
    sections = [
        f"# Model Card for {metadata.model_name}",
        f"A recommender{f', fine-tuned from {published}' if base else ''} with "
        "[TRL](https://github.com/huggingface/trl) and `trl_msl`.",
        "## Quick start\n\n```python\nfrom trl_msl import Recommender\n\n"
        f"recommender = Recommender.from_pretrained({model_id!r})\n"
        f"found = recommender.recommend([[{history}]], k=10)  # ids or texts of a user's items, oldest first\n"
        "for text, score in zip(found.texts[0], found.scores[0]):\n    print(f'{score:8.2f}  {text}')\n```",
        "## What it recommends\n\nOnly items of the catalogue that is saved beside it, by their log-probability among "
        "the tokens that continue some item.",
        f"## Data\n\nTrained with {task.num_trained or len(task.catalog):,} items (at most {task.trie.depth} "
        f"tokens each){rows}{dataset or ''}.",
        *([_evaluation(measured, metrics, split)] if measured else []),
        "## Training procedure",
        *_runs(),
        f"Trained with {method}, introduced in [{paper['title']}](https://huggingface.co/papers/{paper['id']}), "
        f"by `{trainer}`.",
        "### Hyperparameters\n\n" + _table(("option", "value"), options.items()),
        "### Framework versions\n\n" + "\n".join(f"- {name}: {version(name)}" for name in _PACKAGES),
        "## Citations",
        f"Cite {method} as:\n\n```bibtex\n{dedent(paper['citation'])}\n```",
        f"Cite TRL as:\n\n```bibtex\n{dedent(_TRL_CITATION)}\n```",
    ]
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n")


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
    rows = []
    for name in measured:
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        rows.append((name, f"{metrics[name]:.4f}", "-" if low is None else f"{low:.4f} to {high:.4f}"))
    text = f"## Evaluation\n\nOn {metrics['num_rows']:,} {split} rows, over the whole catalogue:\n\n"
    return text + _table(("metric", "value", "95% interval"), rows)


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


def card_tags(tags: list[str]) -> list[str]:
    """Tags of a model, completed as TRL does."""
    if "JOB_ID" in os.environ:
        tags = [*tags, "hf_jobs"]
    if url := get_trackio_space_url():  # replaces the tag without the run's address
        tags = [*(tag for tag in tags if not tag.startswith("trackio:")), f"trackio:{url}"]
    return sorted({"generated_from_trainer", *tags})


def base_license(base: str, download: bool = False) -> str | None:
    """License of a model, from its card in its folder or in the cache, or, with `download`, on the Hub."""
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
