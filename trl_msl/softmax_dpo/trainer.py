# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import copy
import logging
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import global_then_local_main_first, use_adapter

from ..data import RankingTask
from ..model import add_item_vectors, check_tree_attention, evaluating, get_item_vectors, sliding_window
from ..training import SparseHeadOptions, TaskTrainerMixin, add_sparse_lm_head, masked_softmax_loss, softmax_dpo_loss
from .collator import DataCollatorForSoftmaxPreference, segment_mask
from .config import SoftmaxDPOConfig
from .preferences import check_preferences, gather_rejected, tokenize_preferences


logger = logging.getLogger(__name__)


class SoftmaxDPOTrainer(TaskTrainerMixin, DPOTrainer):
    """
    Trainer for Direct Preference Optimization with several rejected completions for each prompt, from the paper [On
    Softmax Direct Preference Optimization for Recommendation](https://huggingface.co/papers/2406.09215) (S-DPO).

    (TRL's `SDPOTrainer` is another method, Self-Distillation Policy Optimization.)

    It differs from [`~trl.DPOTrainer`] in four ways only:

    - `rejected` is one item or a list of items; or there are columns `rejected1` ... `rejectedN`;
    - the loss is [`softmax_dpo_loss`], which for one rejected item is DPO's;
    - an item's log-probability is taken over the tokens that continue some item of the catalogue
      (`normalize="trie"`), through the sparse LM head, or over the whole vocabulary (`"vocab"`), as published;
    - the items of a prompt share it if the model can run a tree of tokens: N items cost one prompt.

    The reference model is chosen as in TRL: the model before the training, with its adapter disabled or replaced by a
    copy (`peft_config=`, or a `PeftModel`); its precomputed log-probabilities (`precompute_ref_log_probs=True`); or
    `ref_model`.

    It logs TRL's `num_tokens`, `rewards/chosen`, `rewards/rejected` and `logps/rejected` (means over the rejected
    items), `logps/chosen`, `rewards/margins`, and `rewards/accuracies`, the share of examples whose chosen item has
    the highest reward.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model, as for [`~trl.DPOTrainer`].
        args ([`SoftmaxDPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        task ([`RankingTask`]):
            What is ranked, as for [`MSLTrainer`].
        **kwargs:
            All other arguments of [`~trl.DPOTrainer`]. Datasets hold `prompt`, `chosen` and `rejected`, standard or
            conversational.

    Raises:
        `ValueError`: if `task` does not fit the model or the rows, a dataset is empty, or an argument is unsupported.

    Example:

    ```python
    from trl_msl import SoftmaxDPOConfig, SoftmaxDPOTrainer

    trainer = SoftmaxDPOTrainer(
        model=AutoPeftModelForCausalLM.from_pretrained("outputs/msl", is_trainable=True),
        args=SoftmaxDPOConfig(output_dir="out"),
        train_dataset=preferences,  # prompt, chosen, rejected (a list)
        task=task,
    )
    trainer.train()
    ```
    """

    _config_class = SoftmaxDPOConfig
    _unsupported = dict.fromkeys(("compute_metrics", "data_collator"), "leave it out")
    _missing_metrics = dict.fromkeys(
        ("mean_token_accuracy", "entropy", "logits/chosen", "logits/rejected"), "eval_rewards/accuracies"
    )
    _tag_names = ["trl", "softmax-dpo"]
    _name = "Softmax DPO"
    _paper = {
        "title": "On Softmax Direct Preference Optimization for Recommendation",
        "id": "2406.09215",
        "citation": """\
            @inproceedings{chen2024softmax,
                title        = {{On Softmax Direct Preference Optimization for Recommendation}},
                author       = {Yuxin Chen and Junfei Tan and An Zhang and Zhengyi Yang and Leheng Sheng and Enzhi Zhang and Xiang Wang and Tat-Seng Chua},
                year         = 2024,
                booktitle    = {Advances in Neural Information Processing Systems 37},
                eprint       = {2406.09215},
            }""",  # fmt: skip # noqa: E501
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: SoftmaxDPOConfig | None = None,
        *,
        task: RankingTask,
        **kwargs: Any,
    ):
        args = self._set_task(task, model, args, kwargs)
        super().__init__(model, ref_model, args, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError(
                "The load-balancing loss of `SoftmaxDPOTrainer` is not supported: set `router_aux_loss_coef` to 0.0."
            )
        self._set_up()

    def _set_up(self) -> None:
        """
        Add the LM heads and replace TRL's collator, once both models are known: after TRL's `__init__`, or at its end
        where it precomputes reference log-probabilities.
        """
        if isinstance(self.data_collator, DataCollatorForSoftmaxPreference):
            return
        if is_peft_model(self.model) and "ref" in self.model.peft_config:
            _copy_trained_tokens(self.model)
        vectors = get_item_vectors(self.model)
        if vectors is not None:  # the reference model has the same
            vectors.requires_grad_(False)
        elif self.task.vector_tokens is not None:
            raise ValueError(
                "`task` puts vectors of items into prompts, but `model` has none: call `load_item_vectors(model, "
                "folder)` first, with the folder that it was trained in."
            )
        models = [self.model]
        if self.ref_model is not None:
            models.append(self.accelerator.unwrap_model(self.ref_model))
            if vectors is not None and get_item_vectors(models[1]) is None:
                add_item_vectors(models[1], copy.deepcopy(vectors))  # TRL may update its weights in place
        is_prompted = any(is_peft_model(model) and model.active_peft_config.is_prompt_learning for model in models)
        models = [model.get_base_model() if is_peft_model(model) else model for model in models]
        for model in models:
            add_sparse_lm_head(model, self.trie)
        self.data_collator = DataCollatorForSoftmaxPreference(
            self.trie,
            self._tokenizer.pad_token_id,
            share_prompt=not is_prompted and all(can_share(model, self.args.max_length) for model in models),
            skip_forced=self.args.normalize == "trie",
            pad_to_multiple_of=self.args.pad_to_multiple_of,
        )

    def _prepare_dataset(self, dataset: Dataset | IterableDataset, processing_class, args, dataset_name):
        if "prompt_ids" in self._column_names(dataset, dataset_name):
            return self._check_rows(dataset, check_preferences, dataset_name)
        with global_then_local_main_first():
            dataset = gather_rejected(dataset)
        return self._map_rows(dataset, tokenize_preferences, dataset_name, args)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        self._set_up()
        if not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        # TRL names its cache file after rows and model, but the values depend on these two as well
        dataset = copy.copy(dataset)
        dataset._fingerprint = Hasher.hash((dataset._fingerprint, self.args.normalize, self.trie))
        # TRL concatenates the batches' results, which must therefore have the same number of columns
        collator = self.data_collator
        self.data_collator = replace(collator, num_rejected=max(map(len, dataset["rejected_ids"])))
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self.data_collator = collator

    def _log_probs(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probability of each completion, chosen first, fp32 of shape `(num_examples, 1 + num_rejected)`."""
        segments, labels = inputs["segments"], inputs["labels"]
        attention_mask = (segments >= 0).long()
        if self.data_collator.share_prompt:
            attention_mask = segment_mask(segments)[:, None]
            unwrapped = self.accelerator.unwrap_model(model)
            if unwrapped.config.get_text_config()._attn_implementation == "eager":  # which adds the mask to the scores
                hidden, least = ~attention_mask, torch.finfo(unwrapped.dtype).min
                attention_mask = torch.zeros_like(hidden, dtype=unwrapped.dtype).masked_fill_(hidden, least)
        over_trie = self.args.normalize == "trie"
        output = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            attention_mask=attention_mask,
            labels=labels,
            sparse_lm_head=SparseHeadOptions(valid_logits=over_trie, vocab_losses=not over_trie),
        )
        row, column = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        if over_trie:
            losses = masked_softmax_loss(output.logits, output.valid_mask, output.targets)
            nodes = labels[row, column + 1]
            branching = self.trie.to(nodes.device).num_valid_tokens(nodes) > 1
            row, column = row[branching], column[branching]
        else:
            losses = output.vocab_losses
        num_examples, num_rejected = inputs["rejected_mask"].shape
        completion = inputs["examples"][row] * (1 + num_rejected) + segments[row, column + 1] - 1
        log_probs = losses.new_zeros(num_examples * (1 + num_rejected)).index_add(0, completion, -losses)
        return log_probs.view(num_examples, 1 + num_rejected)

    def compute_ref_log_probs(self, model, inputs) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the reference model, `(num_examples,)` and `(num_examples, num_rejected)`."""
        adapter = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapter,
            self.accelerator.autocast(),
        ):
            log_probs = self._log_probs(model, inputs)
        return log_probs[:, 0], log_probs[:, 1:]

    def _compute_loss(self, model, inputs, return_outputs):
        log_probs = self._log_probs(model, inputs)
        if self.precompute_ref_logps:
            ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            ref_chosen, ref_rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        ratios = log_probs - torch.cat([ref_chosen.unsqueeze(1), ref_rejected], dim=1)
        losses = softmax_dpo_loss(ratios[:, 0], ratios[:, 1:], self.beta, inputs["rejected_mask"])
        loss = losses.mean()
        self._store_metrics(inputs, losses, log_probs, ratios)
        return (loss, {"log_probs": log_probs}) if return_outputs else loss

    @torch.no_grad()
    def _store_metrics(self, inputs: dict[str, Tensor], losses: Tensor, log_probs: Tensor, ratios: Tensor) -> None:
        """Means over the examples of all ranks, to be logged by `log`."""
        mask = inputs["rejected_mask"]
        best_rejected = ratios[:, 1:].masked_fill(~mask, -torch.inf).amax(dim=1)
        sums = {
            "examples": torch.tensor(len(ratios)),
            "loss": losses.sum(),
            "tokens": (inputs["segments"] >= 0).sum() if self.model.training else torch.tensor(0),
            "rewards/chosen": self.beta * ratios[:, 0].sum(),
            "rewards/rejected": self.beta * _mean(ratios[:, 1:], mask).sum(),
            "rewards/accuracies": (ratios[:, 0] > best_rejected).sum(),
            "logps/chosen": log_probs[:, 0].sum(),
            "logps/rejected": _mean(log_probs[:, 1:], mask).sum(),
        }
        values = torch.stack([value.to(ratios.device, torch.float32) for value in sums.values()])
        sums = dict(zip(sums, self.accelerator.reduce(values, "sum").tolist()))
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self.model.training:
            self._warn_if_diverged(sums["loss"])
        self._total_train_tokens += int(sums["tokens"])
        metrics["num_tokens"] = [self._total_train_tokens]
        means = {name: value / sums["examples"] for name, value in sums.items() if "/" in name}
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        for name, value in means.items():
            metrics[name].append(value)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row's values where the mask is set."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)


def can_share(model: PreTrainedModel, max_length: int | None) -> bool:
    """Whether the completions of a prompt can share it, found out by trying; logs a warning if not."""
    window = sliding_window(model.config.get_text_config())
    if window is not None and (max_length is None or max_length > window):
        logger.warning(
            "Each completion is run with a prompt of its own: some layers attend to %d tokens, `max_length` is %s.",
            window, max_length,
        )  # fmt: skip
        return False
    try:
        with evaluating(model):
            check_tree_attention(model)
    except ValueError as error:
        logger.warning("Each completion is run with a prompt of its own: %s", error)
        return False
    return True


def _copy_trained_tokens(model: PeftModel) -> None:
    """
    Give the reference adapter the policy's rows of trained tokens: TRL copies the weights whose names hold
    ".default.", and the names of these end with it.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and "ref" in module.trainable_tokens_delta:
            module.trainable_tokens_delta["ref"].data.copy_(module.trainable_tokens_delta["default"].data)
