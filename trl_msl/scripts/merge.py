# SPDX-License-Identifier: Apache-2.0
"""
Merge a trained adapter into its base model, with the catalogue beside it, for serving or for scripts that need whole
models, such as TRL's own DPO script.

```bash
trl-msl merge --model_name_or_path outputs/quickstart/msl --output_dir outputs/merged
trl-msl merge --model_name_or_path outputs/mine --output_dir outputs/merged --push_to_hub --hub_model_id user/name
```
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import create_repo, upload_folder
from trl import ModelConfig

from ..data import RankingTask
from ..recommender import Recommender, find_folder, find_task_folder, load_adapter
from ..training import NEVER_PUSHED
from .cards import write_card
from .command_line import command
from .loading import load_tokenizer
from .trained import copy_options


@dataclass
class MergeArguments:
    """
    Arguments of this command, besides those of the model.

    Parameters:
        output_dir (`str`):
            Folder to write, which must not exist.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether to upload it, too, with a model card.
        hub_model_id (`str`, *optional*):
            Repository to upload to. Defaults to one named like the folder.
        hub_private_repo (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
    """

    output_dir: str = field(metadata={"help": "Folder to write, which must not exist."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload it to the Hub, too."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository to upload to."})
    hub_private_repo: bool = field(default=False, metadata={"help": "Whether a new repository is private."})


def main(args: MergeArguments, model_args: ModelConfig) -> None:
    output_dir, name = Path(args.output_dir), model_args.model_name_or_path
    if output_dir.exists():
        raise ValueError(f"`output_dir` = {args.output_dir!r} exists already: name another, or remove it.")
    folder = find_folder(name, "model_name_or_path", model_args.model_revision)
    task = RankingTask.from_pretrained(find_task_folder(folder), load_tokenizer(model_args))
    adapted = load_adapter(folder, task.tokenizer, dtype="auto", trust_remote_code=False)
    model_id = args.output_dir
    if args.push_to_hub:
        repo = args.hub_model_id or output_dir.resolve().name
        model_id = create_repo(repo, private=args.hub_private_repo, exist_ok=True).repo_id
    temporary = output_dir.with_name(f".{output_dir.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    Recommender(adapted.merge_and_unload(), task).save_pretrained(temporary)
    copy_options(folder, temporary)
    write_card(folder, temporary, model_id, f"This is the adapter `{Path(name).name}`, merged into its base model.")
    temporary.replace(output_dir)
    if args.push_to_hub:
        ignored = list(NEVER_PUSHED)
        print(upload_folder(repo_id=model_id, folder_path=output_dir, ignore_patterns=ignored).commit_url)
    print(output_dir)


run = command(main)


if __name__ == "__main__":
    run()
