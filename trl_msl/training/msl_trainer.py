# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTTrainer

from ..data import RankingTask, tokenize_rows
from .losses import bear_weights, masked_softmax_loss
from .msl_config import MSLConfig
from .sparse_head import SparseCausalLMOutput, SparseHeadOptions, add_sparse_lm_head
from .target_trie import TargetTrie, map_labels
from .task_trainer import TaskTrainerMixin
from .temperature import TemperatureCallback
from .tokenized_rows import check_supervision, check_tokenized


class MSLTrainer(TaskTrainerMixin, SFTTrainer):
    """
    Trainer for Masked Softmax Loss (MSL), from the paper [MSL: Not All Tokens Are What You Need for Tuning LLM as a
    Recommender](https://huggingface.co/papers/2504.04178).

    It differs from [`~trl.SFTTrainer`] in three ways only:

    - rows are tokenised by [`tokenize_rows`]: the labels are nodes of the catalogue's trie;
    - the model gets a sparse LM head ([`add_sparse_lm_head`]), which computes only the logits of valid tokens, only
      where several tokens are valid;
    - the loss is [`masked_softmax_loss`], averaged over those positions, with a fixed or an adaptive temperature. As
      τ moves, so does the scale of the training loss; `eval_loss` is taken at τ = 1 and stays comparable. With
      `normalize="vocab"` it is the usual loss instead, over the vocabulary, of every token of a title. With
      `position_weights` the positions of the training loss are weighted.

    With `supervise_history`, every item of a history is supervised in training, and only the targets in evaluation.
    With `negatives="seen"`, the valid tokens in training are those that continue some training target.

    It logs TRL's `num_tokens`; `temperature`; over positions where several tokens are valid, `valid_token_accuracy`,
    how often the right token has the highest logit among the valid ones, and `target_probability`, its mean
    probability among them (τ = 1; in training with `num_negatives`, among those drawn); and with
    `log_lml_parts=True`, `lml`, `lml1` and `lml2` per title token.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`~trl.SFTTrainer`].
        args ([`MSLConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        task ([`RankingTask`]):
            What is ranked: catalogue, tokenizer, prompt, `max_length`. It is saved beside the model, in each
            checkpoint and on the Hub, for [`Recommender.from_pretrained`].
        **kwargs:
            All other arguments of [`~trl.SFTTrainer`]: `train_dataset`, `eval_dataset`, `peft_config`, `callbacks`
            and so on. `processing_class` defaults to the task's tokenizer. Datasets hold `prompt` and `completion`,
            standard or conversational, or what [`tokenize_rows`] made of them.

    Raises:
        `ValueError`: if `task` does not fit the model or the rows, or an argument has no meaning here.

    Example:

    ```python
    from trl_msl import MSLConfig, MSLTrainer, RankingTask, build_rows

    task = RankingTask(catalog, tokenizer, template)
    trainer = MSLTrainer(
        model="Qwen/Qwen3-0.6B",
        args=MSLConfig(output_dir="out"),
        task=task,
        train_dataset=build_rows(windows, task),
        peft_config=LoraConfig(),
    )
    trainer.train()
    ```
    """

    _config_class = MSLConfig
    _unsupported = dict.fromkeys(
        ("compute_loss_func", "compute_metrics", "formatting_func", "preprocess_logits_for_metrics"),
        "full logits are never built. Rank items with `RecommendationCallback`; subclass to change the loss",
    )
    _missing_metrics = dict.fromkeys(("mean_token_accuracy", "entropy"), "eval_valid_token_accuracy")
    _tag_names = ["trl", "msl"]
    _name = "MSL"
    _paper = {
        "title": "MSL: Not All Tokens Are What You Need for Tuning LLM as a Recommender",
        "id": "2504.04178",
        "citation": """\
            @inproceedings{wang2025msl,
                title        = {{MSL: Not All Tokens Are What You Need for Tuning LLM as a Recommender}},
                author       = {Bohao Wang and Feng Liu and Jiawei Chen and Xingyu Lou and Changwang Zhang and Jun Wang and Yuegang Sun and Yan Feng and Chun Chen and Can Wang},
                year         = 2025,
                booktitle    = {Proceedings of the 48th International ACM SIGIR Conference on Research and Development in Information Retrieval},
                eprint       = {2504.04178},
            }""",  # fmt: skip # noqa: E501
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: MSLConfig | None = None,
        *,
        task: RankingTask,
        **kwargs: Any,
    ):
        args = self._set_task(task, model, args, kwargs)
        if args.padding_free and not args.packing:
            args.max_length = None  # TRL refuses a limit that it does not enforce; the task has enforced it already
        self._supervise_history = args.supervise_history
        self._evaluated: dict[str, float] = {}
        self._target_trie: TargetTrie | None = None
        for name, value in (("negatives", "seen"), ("position_weights", "igd")):
            if getattr(args, name) == value and isinstance(kwargs.get("train_dataset"), IterableDataset):
                raise ValueError(
                    f"`{name}` = {value!r} needs all training targets before the first step, but `train_dataset` is a "
                    "stream: pass a `Dataset`, or leave the option out."
                )
        super().__init__(model, args, **kwargs)
        if self._is_vision_dataset:
            raise ValueError("`train_dataset` holds images, which `MSLTrainer` does not support: leave them out.")
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and parallelism.sp_enabled:
            raise ValueError("Sequence parallelism (`sp_size` > 1) is not supported: it reduces the model's own loss.")
        add_sparse_lm_head(self.model.get_base_model() if is_peft_model(self.model) else self.model, task.trie)
        self.add_callback(TemperatureCallback.from_config(args))
        # The loss is divided by the count of the whole accumulated batch, whatever the model's forward accepts
        self.model_accepts_loss_kwargs = True

    @property
    def temperature(self) -> float:
        """Current temperature τ."""
        return self._temperature_callback.value

    @property
    def _temperature_callback(self) -> TemperatureCallback:
        # Looked up each time: `Trainer` replaces callbacks when it restores their states
        return next(c for c in self.callback_handler.callbacks if isinstance(c, TemperatureCallback))

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class,
        args: MSLConfig,
        packing,
        formatting_func,
        dataset_name,
    ):
        # TRL prepares the training rows first. The name doesn't tell: a dataset to evaluate may be called "train", too
        supervise_history, self._supervise_history = self._supervise_history, False
        columns = self._column_names(dataset, dataset_name)
        if "input_ids" not in columns:
            dataset = self._map_rows(dataset, tokenize_rows, dataset_name, args, supervise_history=supervise_history)
        elif "labels" not in columns:
            raise ValueError(
                f"The {dataset_name} dataset has `input_ids` but no `labels`: map `tokenize_rows` over "
                "prompt/completion rows, which makes both."
            )
        else:
            dataset = self._check_rows(dataset, check_tokenized, dataset_name)
            if supervise_history and isinstance(dataset, Dataset):
                check_supervision(dataset, self.task)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def train(self, *args: Any, **kwargs: Any):
        self._target_trie = None  # the rows may have been replaced
        if self.args.negatives == "seen" and self._targets.trie.first_branching_node < 0:
            raise ValueError(
                "`negatives` = 'seen' leaves no wrong token, since all rows of `train_dataset` have the same target: "
                "use 'all'."
            )
        return super().train(*args, **kwargs)

    @property
    def _targets(self) -> TargetTrie:
        if self._target_trie is None:
            self._target_trie = TargetTrie.from_rows(self.train_dataset, self.trie, self.args.device)
        return self._target_trie

    def _have_loss(self, nodes: Tensor) -> Tensor:
        """Whether labels have a loss in training. With MSL, those have one where several tokens are valid."""
        if self.args.normalize == "vocab":
            return torch.ones_like(nodes, dtype=torch.bool)
        if self.args.negatives == "seen":
            return self._targets.have_information_gain(nodes)
        return self.trie.to(nodes.device).num_valid_tokens(nodes) > 1

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        num_items = self._count_labels(batch_samples, device, self._have_loss)
        if num_items is None or self.args.position_weights != "igd":
            return num_items
        num_with_gain = self._count_labels(batch_samples, device, self._targets.have_information_gain)
        return num_with_gain + self.args.igd_weight * (num_items - num_with_gain)  # the sum of the weights

    def _count_labels(self, batch_samples: list, device: torch.device, counted: Callable[[Tensor], Tensor]):
        """Number of labels that are `counted`, over all ranks, as `Trainer` counts them."""
        kept = [map_labels(batch, lambda nodes: nodes.where(counted(nodes), -100)) for batch in batch_samples]
        return super()._get_num_items_in_batch(kept, device)

    def _position_weights(self, output: SparseCausalLMOutput, temperature: float) -> Tensor:
        """Weight of each position that has a loss."""
        args = self.args
        if args.position_weights == "bear":
            constants = args.bear_beams, args.bear_scale, args.bear_weight
            return bear_weights(output.logits, output.valid_mask, output.targets, temperature, *constants)
        nodes = output.nodes[self._have_loss(output.nodes)]
        return torch.where(self._targets.have_information_gain(nodes), 1.0, args.igd_weight)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        trie, temperature = self.trie, self.temperature
        if not self.model.training:
            # Over all valid tokens at τ = 1, as in ranking, and comparable while τ moves. The count is for training
            inputs, temperature, num_items_in_batch = self._without_repeated_rows(inputs), 1.0, None
        elif self.args.negatives == "seen":
            trie, inputs = self._targets.trie, map_labels(inputs, self._targets.renumber)
        over_vocab = self.args.normalize == "vocab"
        options = SparseHeadOptions(
            num_negatives=self.args.num_negatives if self.model.training else None,
            vocab_losses=over_vocab or self.args.log_lml_parts,
            vocab_temperature=temperature if over_vocab else 1.0,
            trie=trie,
        )
        output = model(**inputs, sparse_lm_head=options)
        if over_vocab:
            losses = output.vocab_losses
        else:
            sampled = output.is_sampled
            scale = None if sampled is None else torch.where(sampled, self.args.negative_scale, 1.0)
            losses = masked_softmax_loss(output.logits, output.valid_mask, output.targets, temperature, scale)
        num_items = len(losses) if num_items_in_batch is None else num_items_in_batch
        if self.model.training and self.args.position_weights:
            losses = losses * self._position_weights(output, temperature)
        # Clamped, so that a batch without branching positions gives 0 rather than `0 / 0`
        loss = losses.sum() / torch.as_tensor(num_items, device=losses.device).clamp(min=1e-6)
        # As in TRL: `num_items_in_batch` counts the positions of every rank, and DDP averages the gradients
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * output.aux_loss / steps
        if self.model.training:
            self._temperature_callback.observe(output, trie.first_branching_node)
        self._store_metrics(inputs, output, losses.detach())
        return (loss, output) if return_outputs else loss

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """
        Inputs without the labels of rows that accelerate repeats to fill the last batch of an evaluation by several
        processes: `gather_for_metrics` drops such rows, and sums over ranks would count them twice.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or "labels" not in inputs or not state.end_of_dataloader:
            return inputs
        labels = inputs["labels"].clone()
        if state.remainder > 0:  # rows of all ranks in the last batch, rank by rank
            labels[max(0, state.remainder - self.accelerator.process_index * len(labels)) :] = -100
        return {**inputs, "labels": labels}

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._evaluated = {"loss": 0.0, "losses": 0, "aux_loss": 0.0, "batches": 0}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if f"{metric_key_prefix}_loss" in output.metrics:
            # The mean over all positions: `Trainer` weights each batch's mean by its rows, so its mean would depend on
            # the batch size
            total = self._evaluated
            loss = total["loss"] / max(total["losses"], 1)
            if self.aux_loss_enabled:
                loss += self.router_aux_loss_coef * total["aux_loss"] / max(total["batches"], 1)
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    @torch.no_grad()
    def _store_metrics(self, inputs: dict[str, Any], output: SparseCausalLMOutput, losses: Tensor) -> None:
        """Sum over the positions of all ranks, for the means that `log` logs and for `eval_loss`."""
        restricted = masked_softmax_loss(output.logits, output.valid_mask, output.targets)
        best = output.logits.masked_fill(~output.valid_mask, -torch.inf)
        num_correct = (best.argmax(dim=-1) == output.targets).sum() if len(restricted) else restricted.sum()
        num_tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        sums = {
            "tokens": num_tokens if self.model.training else 0,
            "loss": losses.sum(),
            "losses": len(losses),
            "positions": len(restricted),
            "valid_token_accuracy": num_correct,
            "target_probability": restricted.neg().exp().sum(),
            "aux_loss": output.aux_loss if self.aux_loss_enabled else 0.0,
        }
        if self.args.log_lml_parts:
            lml, lml2 = output.vocab_losses.sum(), restricted.sum()
            sums |= {"supervised": len(output.vocab_losses), "lml": lml, "lml1": lml - lml2, "lml2": lml2}
        values = torch.stack([torch.as_tensor(v, device=losses.device).float() for v in sums.values()])
        sums = dict(zip(sums, self.accelerator.reduce(values, "sum").tolist()))
        sums["aux_loss"] /= self.accelerator.num_processes
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self.model.training:
            self._warn_if_diverged(sums["loss"])
        else:
            for name in self._evaluated:
                self._evaluated[name] += sums.get(name, 1)
        self._total_train_tokens += int(sums["tokens"]) // self.get_tp_size()
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["temperature"].append(self.temperature)
        for name in ("valid_token_accuracy", "target_probability"):
            metrics[name].append(sums[name] / max(sums["positions"], 1))
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(sums["aux_loss"])
        for name in ("lml", "lml1", "lml2") if "lml" in sums else ():
            metrics[name].append(sums[name] / max(sums["supervised"], 1))
