# SPDX-License-Identifier: Apache-2.0
"""
Merge a trained adapter into its base model, with the catalogue beside it, for serving or for scripts that need whole
models, such as TRL's own DPO script.

```bash
trl-msl merge --model_name_or_path outputs/quickstart/msl --output_dir outputs/merged
```
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from ..data import RankingTask
from ..recommender import Recommender, find_folder, find_task_folder, load_adapter
from .command_line import command
from .loading import load_tokenizer
from .trained import DATA_FILE


@dataclass
class MergeArguments:
    """
    Arguments of this command, besides those of the model.

    Parameters:
        output_dir (`str`):
            Folder to write, which must not exist.
    """

    output_dir: str = field(metadata={"help": "Folder to write, which must not exist."})


def main(args: MergeArguments, model_args: ModelConfig) -> None:
    output_dir, name = Path(args.output_dir), model_args.model_name_or_path
    if output_dir.exists():
        raise ValueError(f"`output_dir` = {args.output_dir!r} exists already: name another, or remove it.")
    folder = find_folder(name, "model_name_or_path", model_args.model_revision)
    task = RankingTask.from_pretrained(find_task_folder(folder), load_tokenizer(model_args))
    adapted = load_adapter(folder, task.tokenizer, dtype="auto", trust_remote_code=False)
    temporary = output_dir.with_name(f".{output_dir.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    Recommender(adapted.merge_and_unload(), task).save_pretrained(temporary)
    if (folder / DATA_FILE).is_file():
        shutil.copy(folder / DATA_FILE, temporary)
    temporary.replace(output_dir)
    print(output_dir)


run = command(main)


if __name__ == "__main__":
    run()
