# SPDX-License-Identifier: Apache-2.0
"""The model card of a model that carries its catalogue."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
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
    method: str,
    paper: dict[str, str],
    num_rows: int | None,
    metrics: dict[str, float],
) -> ModelCard:
    """
    A model card with a usage example, what the model recommends, its data, ranking metrics and training procedure.

    Args:
        metadata ([`~huggingface_hub.ModelCardData`]):
            Head of the card; `model_name` is its title.
        task ([`RankingTask`]):
            What the model ranks.
        model_id (`str`):
            Repository or folder of the model.
        base (`str`):
            Repository or folder of the model that the training began with; empty if unknown.
        method, paper (`str`, `dict[str, str]`):
            Name of the training method, and `title`, `id` and `citation` of its paper.
        num_rows (`int`, *optional*):
            Number of training rows, where it is known.
        metrics (`dict[str, float]`):
            Entry of the trainer's log, of which the measurements of [`RecommendationCallback`] are shown.
    """
    published = f"[{base}](https://huggingface.co/{base})" if metadata.base_model else f"`{Path(base).name}`"
    history = ", ".join(repr(item) for item in task.catalog.ids[:2])
    rows = "" if num_rows is None else f" and {num_rows:,} training rows"
    dataset = metadata.datasets and f" of [{metadata.datasets}](https://huggingface.co/datasets/{metadata.datasets})"
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
        *_evaluation(metrics),
        "## Training procedure",
        *_runs(),
        f"Trained with {method}, introduced in [{paper['title']}](https://huggingface.co/papers/{paper['id']}).",
        "### Framework versions\n\n" + "\n".join(f"- {name}: {version(name)}" for name in _PACKAGES),
        "## Citations",
        f"Cite {method} as:\n\n```bibtex\n{dedent(paper['citation'])}\n```",
        f"Cite TRL as:\n\n```bibtex\n{dedent(_TRL_CITATION)}\n```",
    ]
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n")


def _evaluation(metrics: dict[str, float]) -> list[str]:
    if "eval_num_rows" not in metrics:
        return []
    measured = [name for name in metrics if "@" in name and not name.endswith(("_low", "_high"))]
    lines = [f"## Evaluation\n\nOn {metrics['eval_num_rows']:,} validation rows, over the whole catalogue:\n"]
    lines += ["| metric | value | 95% interval |", "|---|---|---|"]
    for name in measured:
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = "" if low is None else f"{low:.4f} to {high:.4f}"
        lines.append(f"| {name.removeprefix('eval_')} | {metrics[name]:.4f} | {interval} |")
    return ["\n".join(lines)]


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


def base_license(base: str) -> str | None:
    """License of a model, from its card in its folder or in the cache; nothing is downloaded."""
    path = Path(base) / "README.md" if Path(base).is_dir() else base and try_to_load_from_cache(base, "README.md")
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    return ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
