# SPDX-License-Identifier: Apache-2.0
"""Loading models and tokenizers from folders and repositories, whose files may come from anybody."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..data import TASK_FILE, TASK_FILES
from ..model import load_item_vectors
from ..trie import check_regular, replacing


logger = logging.getLogger(__name__)

# What transformers and the libraries below it raise for files that are damaged, foreign or missing
_UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError,
    UnpicklingError,
)  # fmt: skip


def find_folder(name: str | Path, argument: str, revision: str | None = None, **kwargs: Any) -> Path:
    """The folder itself, or that of a repository's snapshot."""
    if os.path.isdir(name):  # unlike `Path.is_dir`, also for names that no file system takes
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, **kwargs))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{argument}` = {str(name)!r} is not a folder, and can't be loaded from the Hub ({error})."
        ) from error


def find_task_folder(folder: Path, subfolder: str = "") -> Path:
    """Where the task of the model in `folder` is: there, or, for an adapter without one, beside its base model."""
    base = None if (folder / TASK_FILE).exists() else find_base(folder / subfolder)
    return folder if base is None else find_folder(base, "base_model_name_or_path", allow_patterns=TASK_FILES)


def find_base(folder: Path) -> str | None:
    """
    Folder or repository of the base model, if there is an adapter in the folder. A relative path, which was written
    where the training ran, is resolved from the current folder, else from that of the adapter or one above it.

    Raises:
        `ValueError`: if it is a folder that does not exist.
    """
    name = _base_in_config(folder)
    if name is None or (folder / "config.json").exists():  # the latter: the base model lies beside it
        return name
    for place in ("", folder.resolve(), *folder.resolve().parents):
        path = os.path.join(place, name)
        if os.path.isfile(os.path.join(path, "config.json")):  # a folder may just share its name with a repository
            if place:
                logger.info("The base model of %s is %s.", folder, path)
            return path
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{folder / 'adapter_config.json'} names {name!r} as `base_model_name_or_path`, but there is no such "
            "folder here, in the adapter's folder, or in one above it: correct it, or merge the two (`trl-msl merge`) "
            "where the base model is."
        ) from error
    return name


def name_base_absolutely(folder: Path, base: str | None) -> None:
    """Let the adapter in a folder, if there is one, name its base model so that it is found from everywhere."""
    if base is None or not os.path.isdir(base):
        return
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = os.path.abspath(base)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_files(folder: Path, subfolder: str = "") -> None:
    """Raise a `ValueError` if loading the model would read a file that never ends, or weights outside its folder."""
    for place in {folder, folder / subfolder}:
        _check_files(place)
    base = find_base(folder / subfolder)
    if base is not None and os.path.isdir(base):
        _check_files(Path(base))


def _check_files(folder: Path) -> None:
    for path in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")):
        if path.exists() and not path.is_dir():
            check_regular(path)
        if ".index." not in path.name or path.suffix != ".json":
            continue
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            outside = [name for name in names if name != Path(name).name]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
        if outside:
            raise ValueError(
                f"{path} names weights outside its folder, such as {outside[0][-200:]!r}, which are not read: put all "
                "weights beside it."
            )


def _base_in_config(folder: Path) -> str | None:
    """What an adapter's configuration names as its base model, if there is one."""
    try:
        name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def load_causal_lm(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """
    Load a model, or an adapter and its base model from where [`find_base`] finds it. `kwargs` are those of
    `from_pretrained`.
    """
    adapter = Path(folder, kwargs.get("subfolder", ""))
    base = find_base(adapter)
    if base == _base_in_config(adapter):
        model = load(AutoModelForCausalLM, folder, **kwargs)
    else:
        model = load(AutoModelForCausalLM, base, **{**kwargs, "subfolder": ""})
        with _damage_reported(f"The adapter in {str(adapter)!r} can't be loaded"):
            model.load_adapter(str(adapter))
        _name_base(model, base)
    _load_vectors(model, adapter, base)
    return model


def _load_vectors(model: PreTrainedModel | PeftModel, folder: Path, base: str | None) -> None:
    """The item vectors beside a model or, for an adapter without any, beside its base model."""
    if load_item_vectors(model, folder) is None and base is not None and os.path.isdir(base):
        load_item_vectors(model, Path(base))


def load_adapter(
    folder: Path, tokenizer: PreTrainedTokenizerBase, is_trainable: bool = False, **kwargs: Any
) -> PeftModel:
    """As [`load_causal_lm`], for an adapter to be merged or trained further."""
    base = find_base(folder)
    if base is None:
        raise ValueError(f"{str(folder)!r} holds no adapter (adapter_config.json): it is a whole model already.")
    model = load(AutoModelForCausalLM, base, revision=PeftConfig.from_pretrained(folder).revision, **kwargs)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # tokens were added before training
        model.resize_token_embeddings(len(tokenizer))
    with _damage_reported(f"The adapter in {str(folder)!r} can't be loaded"):
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    _name_base(adapted, base)
    _load_vectors(adapted, folder, base)
    return adapted


def _name_base(model: PreTrainedModel | PeftModel, base: str) -> None:
    """Let an adapter name its base model by where it was found, for when it is saved elsewhere."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base


def load(auto_class: type, folder: str | Path, **kwargs: Any) -> Any:
    """Load a model or tokenizer; whatever transformers raises for damaged or foreign files becomes a `ValueError`."""
    with _damage_reported(f"{auto_class.__name__} can't load {str(folder)!r}"):
        return auto_class.from_pretrained(folder, **kwargs)


@contextmanager
def _damage_reported(message: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, but its files are fine
        raise
    except _UNREADABLE as error:
        raise ValueError(
            f"{message} ({type(error).__name__}: {error}). Check that its files are complete and, for an adapter, "
            "that the base model is where adapter_config.json says: correct it there, or merge the two where it is."
        ) from error
