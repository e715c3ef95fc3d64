# SPDX-License-Identifier: Apache-2.0
"""
Distil a trained model into SASRec, which ranks thousands of users per second on a CPU, as in
[DLLM2Rec](https://huggingface.co/papers/2405.00338).

```bash
pip install "trl_msl[baselines]"
trl-msl distill --model_name_or_path outputs/mine/msl --output_dir outputs/mine/distilled
```

The trained model, the teacher, ranks the history of each training window by exact search. The student is SASRec,
trained by the softmax over all items as `trl-msl baselines --model sasrec-softmax`, to which

    distillation_weight · Σ w · −log P_student(item)

is added, over the teacher's best items for the window's history. The weight w is large for items that the teacher
ranks first (`rank_weight`), is sure of (`confidence_weight`), and that the student has among its best, too
(`consistency_weight`). The student also sees the titles: `embedding_weight` times a linear function of the teacher's
embedding of the title is added to each item's own. It ranks the items of the training windows.

The same SASRec is trained without a teacher, to compare. `output_dir` then holds the student's files, those of
`trl-msl baselines`, so that `trl-msl fuse --scores <output_dir>` uses its scores; the folders `teacher` and `plain`
are there for `trl-msl report --runs <output_dir>`. The student's weights are not written. A fusion beside the teacher
is not used: the teacher is the model alone.

The teacher takes nearly all of the time. Its rankings are kept in `teacher_rankings`: a killed run resumes there, and
another student is trained in minutes. `max_teacher_windows` limits them; a larger value later adds to those that are
there.
"""

import dataclasses
import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, set_seed
from trl import ModelConfig

from ..collaborative import FUSION_FILE, count_users
from ..data import DataArguments, RankingTask, write_item_vectors
from ..evaluation import coverage, ranking_metrics, ranks_of_targets
from ..recommender import find_folder
from .baselines import NUM_SCORED, TOP_K, BaselineArguments, Scorer, TransformerArguments, fill, write_scores
from .command_line import command
from .evaluate import find_output_dir
from .loading import Data, load_model
from .outputs import format_table, write_results
from .recommend import check_job, model_fingerprints
from .searches import Split, mean_ndcg
from .teacher import Teacher
from .trained import load_trained


logger = logging.getLogger(__name__)

COLUMNS = (f"ndcg@{TOP_K}", f"hr@{TOP_K}", "users_per_second")
WEIGHTS = ("rank_weight", "confidence_weight", "consistency_weight")


@dataclass
class DistillArguments(TransformerArguments):
    """
    Arguments of this command, besides those of the data and the model, and of [`TransformerArguments`], which are the
    student's. The defaults of the weights are those of the paper's code.

    Parameters:
        output_dir (`str`):
            Folder to write into.
        distillation_weight (`float`, *optional*, defaults to `0.8`):
            Weight of [`distillation_loss`].
        rank_weight, confidence_weight, consistency_weight (`float`, *optional*, defaults to `0.3`, `0.5` and `0.1`):
            As for [`importance_weights`].
        embedding_weight (`float`, *optional*, defaults to `0.2`):
            Weight of the titles' embeddings in the items'.
        teacher_top_k (`int`, *optional*, defaults to `10`):
            Number of the teacher's items to learn from.
        max_teacher_windows (`int`, *optional*):
            Most histories that the teacher ranks, drawn at random. By default all.
        max_expansions (`int`, *optional*, defaults to `1024`):
            As for [`TrieDecoder.search`].
        teacher_batch_size, part_size (`int`, *optional*, defaults to `16` and `200`):
            Histories that the teacher ranks at a time, and histories per part. A killed run loses at most one part.
        max_length (`int`, *optional*):
            Most tokens of a prompt and an item together, for models saved without a task.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    output_dir: str = field(kw_only=True, metadata={"help": "Folder to write into."})
    distillation_weight: float = field(default=0.8, metadata={"help": "Weight of the distillation."})
    rank_weight: float = field(default=0.3, metadata={"help": "Weight of the teacher's first items in it."})
    confidence_weight: float = field(default=0.5, metadata={"help": "Weight of the items the teacher is sure of."})
    consistency_weight: float = field(default=0.1, metadata={"help": "Weight of items that the student has, too."})
    embedding_weight: float = field(default=0.2, metadata={"help": "Weight of the titles' embeddings."})
    teacher_top_k: int = field(default=10, metadata={"help": "Number of the teacher's items to learn from."})
    max_teacher_windows: int | None = field(default=None, metadata={"help": "Most histories that it ranks."})
    max_expansions: int = field(default=1024, metadata={"help": "Most search steps per history."})
    teacher_batch_size: int = field(default=16, metadata={"help": "Histories that it ranks at a time."})
    part_size: int = field(default=200, metadata={"help": "Histories per part."})
    max_length: int | None = field(default=None, metadata={"help": "Longer prompts lose their oldest items."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_teacher_windows", "max_expansions", "teacher_batch_size", "part_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}: it must be at least 1.")
        if self.teacher_top_k < TOP_K:
            raise ValueError(f"`teacher_top_k` is {self.teacher_top_k}: it must be at least {TOP_K}, for the metrics.")
        for name in ("distillation_weight", *WEIGHTS, "embedding_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be a finite number, and at least 0.")
        if not any(getattr(self, name) for name in WEIGHTS):
            raise ValueError(f"{', '.join(WEIGHTS)} are all 0: one must be above.")


def main(args: DistillArguments, data_args: DataArguments, model_args: ModelConfig) -> None:
    from .sequence_models import item_embeddings, train_transformer  # isort: skip # says how to install RecTools
    from .distilled_sasrec import student_options, title_features

    if (num_processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"`num_processes` is {num_processes}, but SASRec trains in one process: pass 1.")
    find_output_dir(args.output_dir, "")  # not that of a training
    data, task = load_trained(model_args, data_args, args.max_length, args.trust_remote_code)
    folder = find_folder(model_args.model_name_or_path, "model_name_or_path", model_args.model_revision)
    if (folder / FUSION_FILE).exists():
        logger.warning("The teacher is the model alone, without its fusion: pass the student to `trl-msl fuse`.")
    splits = {name: Split.from_data(data, name, task) for name in ("train", "validation", "test")}
    train, test = splits["train"], splits["test"]
    windows = [[*history, target] for history, target in zip(train.histories, train.targets.tolist())]
    counts = count_users(windows, data.windows["train"]["user_id"], len(task.catalog)).numpy()
    measure = Measure(splits, counts, data, Path(args.output_dir))

    teacher = make_teacher(args, load_model(model_args, args.trust_remote_code), task, train)
    rows = draw_rows(train.histories)[: args.max_teacher_windows]
    items, log_probs, found = teacher.rank("train", [train.prompts[row] for row in rows])
    started = time.perf_counter()
    features = title_features(teacher.embed_titles()) if args.embedding_weight else None
    teacher_seconds = found["seconds"].sum() + time.perf_counter() - started
    best, _, found = teacher.rank(f"test-{fingerprint(test)[:12]}", test.prompts)
    about = {"exact_rate": float(found["exact"].mean()), "num_parameters": teacher.model.num_parameters()}
    results = {"teacher": measure.write("teacher", best[:, :TOP_K], found["seconds"].sum(), about)}

    shared = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(TransformerArguments)}
    settings = BaselineArguments(model="sasrec-softmax", **shared)
    weights = {name: getattr(args, name) for name in WEIGHTS}
    histories = [train.histories[row] for row in rows]
    student = student_options(histories, items, log_probs, args.distillation_weight, weights, args.embedding_weight)
    arguments = {"model_name_or_path": model_args.model_name_or_path, **vars(args), "data": vars(data.args)}
    for name, options in (("plain", {}), ("student", {"features": features, **student})):
        print(f"\n{name.capitalize()}", flush=True)
        set_seed(args.seed)
        started = time.perf_counter()
        score, chosen = train_transformer(settings, windows, measure.validate, **options)
        chosen |= {"train_seconds": round(time.perf_counter() - started, 1), "seed": args.seed, "arguments": arguments}
        if name == "student":
            chosen["train_seconds"] += round(teacher_seconds, 1)
            chosen |= {"teacher_seconds": round(teacher_seconds, 1), "teacher_windows": len(rows)}
        place = "." if name == "student" else name
        results[name] = measure.score(place, score, chosen)
        known, embeddings = item_embeddings(score.args[0])
        ids = [task.catalog.ids[item] for item in known]
        write_item_vectors(Path(args.output_dir, place, "item_embeddings.safetensors"), embeddings, ids)
    print(
        f"\nTest, {len(test.targets)} users, {len(task.catalog)} items; the teacher ranked {len(rows)} histories\n"
        f"{format_table(results, COLUMNS)}\n\n{args.output_dir}/metrics.json"
    )


def draw_rows(histories: list[list[int]]) -> list[int]:
    """A row of each distinct history, in a random order that is always the same, so that more rows can be added."""
    rows = list({tuple(history): row for row, history in enumerate(histories)}.values())
    return np.random.default_rng(0).permutation(rows).tolist()


def fingerprint(split: Split) -> str:
    """SHA-256 of a split's histories."""
    return hashlib.sha256(json.dumps(split.histories).encode()).hexdigest()


def make_teacher(args: DistillArguments, model: PreTrainedModel, task: RankingTask, train: Split) -> Teacher:
    """The teacher, if what its folder already holds comes from the same model, histories and options."""
    folder = Path(args.output_dir, "teacher_rankings")
    options = {name: getattr(args, name) for name in ("teacher_top_k", "max_expansions", "part_size")}
    histories = {"histories_sha256": fingerprint(train)}
    check_job(folder, {**options, **model_fingerprints(model, task), **histories})
    return Teacher(
        model, task, folder, args.teacher_top_k, args.max_expansions, args.teacher_batch_size, args.part_size
    )


class Measure:
    """Metrics of the systems, which are written into a folder of each."""

    def __init__(self, splits: dict[str, Split], counts: np.ndarray, data: Data, folder: Path):
        self.splits, self.counts, self.data, self.folder = splits, counts, data, folder
        self.popular = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]

    def validate(self, score: Scorer) -> float:
        """NDCG@10 on validation."""
        validation = self.splits["validation"]
        return mean_ndcg(fill(score(validation.histories, TOP_K)[0], self.popular), validation)

    def score(self, name: str, score: Scorer, about: dict[str, Any]) -> dict[str, float]:
        """Measure a student, and write its scores, too."""
        started = time.perf_counter()
        items = fill(score(self.splits["test"].histories, TOP_K)[0], self.popular)
        seconds = time.perf_counter() - started
        for split in ("validation", "test"):
            scored = score(self.splits[split].histories, NUM_SCORED)
            write_scores(self.folder / name / f"scores_{split}.parquet", self.data.catalog, *scored)
        return self.write(name, items, seconds, about)

    def write(self, name: str, items: np.ndarray, seconds: float, about: dict[str, Any]) -> dict[str, float]:
        """Measure and write what a system recommends on test, for which it took some seconds."""
        test, catalog = self.splits["test"], self.data.catalog
        ranks = ranks_of_targets(items, test.targets)
        metrics = {
            **ranking_metrics(ranks, (5, TOP_K), confidence=0.95, is_cold=self.counts[test.targets] == 0),
            "coverage": coverage(items, len(catalog)),
            "num_rows": len(ranks),
            "test_seconds": seconds,
            "users_per_second": len(ranks) / seconds,
            **about,
        }
        seen = {catalog.ids[item] for item in self.popular}
        write_results(self.folder / name, metrics, catalog, test.target_ids, items, ranks, seen)
        return metrics


run = command(main)


if __name__ == "__main__":
    run()
