# SPDX-License-Identifier: Apache-2.0
"""
Merge a trained adapter into its base model, with the catalogue beside it, for serving or for scripts that need whole
models, such as TRL's own DPO script.

```bash
trl-msl merge --model_name_or_path outputs/quickstart/msl --output_dir outputs/merged
trl-msl merge --model_name_or_path outputs/mine --output_dir outputs/merged --push_to_hub --hub_model_id user/name
```
"""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import create_repo, upload_folder
from trl import ModelConfig

from ..collaborative import load_fusion
from ..data import RankingTask
from ..recommender import Recommender, find_folder, find_task_folder, load_adapter
from ..training import NEVER_PUSHED
from .command_line import command
from .derived import new_folder, write_card
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
            Whether to upload it, too.
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
    name, model_id = model_args.model_name_or_path, args.output_dir
    with new_folder(args.output_dir) as folder:
        adapter = find_folder(name, "model_name_or_path", model_args.model_revision)
        task = RankingTask.from_pretrained(find_task_folder(adapter), load_tokenizer(model_args))
        model = load_adapter(adapter, task.tokenizer, dtype="auto", trust_remote_code=False)
        if args.push_to_hub:  # before the work, as it may be refused
            repo = args.hub_model_id or Path(args.output_dir).resolve().name
            model_id = create_repo(repo, private=args.hub_private_repo, exist_ok=True).repo_id
        fusion = load_fusion(adapter, len(task.catalog))
        Recommender(model.merge_and_unload(), task, fusion).save_pretrained(folder)
        copy_options(adapter, folder)
        write_card(adapter, folder, model_id, f"This is the adapter `{Path(name).name}`, merged into its base model.")
    if args.push_to_hub:
        options = {"folder_path": args.output_dir, "ignore_patterns": list(NEVER_PUSHED)}
        print(upload_folder(repo_id=model_id, **options).commit_url)
    print(args.output_dir)


run = command(main)


if __name__ == "__main__":
    run()
