# SPDX-License-Identifier: Apache-2.0
"""What the card of a model that carries its catalogue says of it."""

from __future__ import annotations

from ..data import RankingTask


def describe_recommender(model_id: str, task: RankingTask, num_rows: int | None, metrics: dict[str, float]) -> str:
    """
    Sections of a model card: a usage example that runs, the method, data, and ranking metrics.

    Args:
        model_id (`str`):
            Repository or folder of the model.
        task ([`RankingTask`]):
            What it ranks.
        num_rows (`int`, *optional*):
            Number of training rows, where it is known.
        metrics (`dict[str, float]`):
            Entry of the trainer's log; what [`RecommendationCallback`] measured is shown, nothing otherwise.

    Returns:
        `str`: Markdown.
    """
    catalog = task.catalog
    history = ", ".join(repr(item) for item in catalog.ids[:2])
    sections = [
        "## Quick start\n\n```python\nfrom trl_msl import Recommender\n\n"
        f"recommender = Recommender.from_pretrained({model_id!r})\n"
        f"found = recommender.recommend([[{history}]], k=10)  # ids or texts of what a user has had, oldest first\n"
        "for text, score in zip(found.texts[0], found.scores[0]):\n    print(f'{score:8.2f}  {text}')\n```",
        "It recommends items of the catalogue that it carries, and nothing else, by the log-probability among the "
        "tokens that continue some item, which is what the Masked Softmax Loss trains.",
        f"## Data\n\nTrained with {len(catalog):,} items ({task.trie.depth} tokens at most)"
        + (f", {num_rows:,} training rows." if num_rows else "."),
    ]
    measured = [name for name in metrics if "@" in name and not name.endswith(("_low", "_high"))]
    if measured:
        lines = [f"## Evaluation\n\nOn {metrics['eval_num_rows']:,} validation rows, over the whole catalogue:\n"]
        lines += ["| metric | value | 95% interval |", "|---|---|---|"]
        for name in measured:
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            interval = "" if low is None else f"{low:.4f} to {high:.4f}"
            lines.append(f"| {name.removeprefix('eval_')} | {metrics[name]:.4f} | {interval} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n\n"
