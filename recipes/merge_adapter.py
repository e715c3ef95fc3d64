# SPDX-License-Identifier: Apache-2.0
"""
Merge a trained adapter into its base model, with the catalogue beside it: for serving, and for scripts that take whole
models, such as TRL's own DPO script.

```bash
python recipes/merge_adapter.py --model_name_or_path outputs/quickstart/msl --output_dir outputs/merged
```
"""

from dataclasses import dataclass, field
from pathlib import Path

from peft import AutoPeftModelForCausalLM
from trl import ModelConfig, TrlParser

from trl_msl import Recommender


@dataclass
class MergeArguments:
    """
    Arguments of this recipe, besides those of the model.

    Parameters:
        output_dir (`str`):
            Folder to write, which must not exist.
    """

    output_dir: str = field(metadata={"help": "Folder to write, which must not exist."})


def main(args: MergeArguments, model_args: ModelConfig) -> None:
    if Path(args.output_dir).exists():
        raise ValueError(f"`output_dir` = {args.output_dir!r} exists already: name another, or remove it.")
    recommender = Recommender.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    adapted = AutoPeftModelForCausalLM.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, dtype=model_args.dtype
    )
    temporary = f"{args.output_dir}.tmp"
    Recommender(adapted.merge_and_unload(), recommender.tokenizer, recommender.bundle).save_pretrained(temporary)
    Path(temporary).replace(args.output_dir)
    print(args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((MergeArguments, ModelConfig)).parse_args_and_config())
