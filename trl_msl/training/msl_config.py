# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import SFTConfig


class TrainingConfigMixin:
    """For a config of TRL: without an accelerator it runs on the CPU, by default in fp32."""

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.dataloader_pin_memory = False  # PyTorch would warn that it can't
        if self.use_cpu and self.bf16 is None:
            self.bf16 = False
        # TRL's default uses the old name of this option, of which transformers would warn
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()


@dataclass
class MSLConfig(TrainingConfigMixin, SFTConfig):
    r"""
    Configuration class for the [`MSLTrainer`].

    It adds the parameters of the masked softmax loss to [`~trl.SFTConfig`]. Defaults are those of the code that the
    authors of the [MSL paper](https://huggingface.co/papers/2504.04178) released.

    Parameters:
        temperature (`float` or `str`, *optional*, defaults to `"adaptive"`):
            Temperature τ of the loss: a positive number, or `"adaptive"` for the adaptive temperature strategy (ATS),
            which starts at `temperature_init`.
        temperature_eta (`float`, *optional*, defaults to `0.25`):
            Probability η that ATS aims to give the target.
        temperature_init (`float`, *optional*, defaults to `1.5`):
            First value of the adaptive temperature.
        temperature_min (`float`, *optional*, defaults to `1.5`):
            Lower bound on each new estimate of the adaptive temperature.
        temperature_max (`float`, *optional*, defaults to `5.0`):
            Upper bound on each new estimate of the adaptive temperature.
        temperature_ema (`float`, *optional*, defaults to `0.05`):
            Weight of a new estimate in the exponential moving average, updated once per optimizer step.
        temperature_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps during which the adaptive temperature stays at `temperature_init`.
        temperature_positions (`str`, *optional*, defaults to `"first"`):
            Positions that the estimate is made from: `"first"`, where items begin to differ, as in the released code;
            or `"all"`, the product over an item's tokens, as in Eq. 12 of the paper.
        normalize (`str`, *optional*, defaults to `"trie"`):
            What a target's probability is normalised over: `"trie"`, the tokens that continue some item (MSL); or
            `"vocab"`, the whole vocabulary, which at `temperature=1` is the language modeling loss (LML) of
            [`~trl.SFTTrainer`].
        supervise_history (`bool`, *optional*, defaults to `False`):
            Whether each item of the history but the first is also a training target, given the ones before it, in the
            same forward. Needs rows with a `history` and a `prompt_template` with `separate_items`.
        negatives (`str`, *optional*, defaults to `"all"`):
            Which items the wrong tokens come from in training: `"all"` items of the catalogue (the paper), or only
            those `"seen"`, the targets of some training row. With `"seen"`, a token that leads only to other items,
            such as new ones, is not trained down. Evaluation and ranking are always over all items.
        num_negatives (`int`, *optional*):
            Number of wrong tokens to draw where more are valid, uniformly with replacement (a token drawn twice counts
            once). Defaults to all of them, as the adaptive temperature requires.
        negative_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the sum over drawn negatives, as in the scaled cross-entropy (SCE) of
            [Xu et al.](https://huggingface.co/papers/2408.14238).
        position_weights (`str`, *optional*):
            Weights on the positions of the training loss: `"bear"`, more weight where the target is among the
            `bear_beams` most probable valid tokens ([BEAR](https://huggingface.co/papers/2601.22925), see
            [`bear_weights`]); or `"igd"`, less weight where the token rules out no target of the training rows
            ([IGD](https://huggingface.co/papers/2506.13229), see [`TargetTrie`]). Defaults to none.
        bear_beams (`int`, *optional*, defaults to `10`):
            B of BEAR: number of beams of the search that it prepares for.
        bear_scale (`float`, *optional*, defaults to `2.75`):
            ξ of BEAR: how gradually the weight changes around the B-th most probable token. The default is the value
            in the README of the authors' code.
        bear_weight (`float`, *optional*, defaults to `0.25`):
            λ of BEAR, with a default from the same place: weights lie between 1 and 1 + λ. Between -1 and 0, targets
            *outside* the B most probable tokens have the larger weight.
        igd_weight (`float`, *optional*, defaults to `0.1`):
            β of IGD: weight of tokens without information gain, between 0 and 1. The default is where the authors
            recommend to begin.
        log_lml_parts (`bool`, *optional*, defaults to `False`):
            Whether to log the language modeling loss (LML) of the titles and its two parts (Eq. 2-4): `lml1`, minus
            the log-probability of the valid tokens, and `lml2`, the masked softmax loss at τ = 1. Costs a projection
            onto the whole vocabulary, without gradient, at each step.
        max_length (`int`, *optional*):
            Maximum number of tokens of a prompt and an item together. Defaults to that of the [`RankingTask`], where
            it is set; a different value here is an error.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            Whether NaN and infinite losses are left out of the logged mean. They are by default in
            [`~transformers.TrainingArguments`], where a diverged run logs a loss of 0.
    """

    # `None` stands in the annotation only because the argument parser takes `float | str | None` as a string
    temperature: float | str | None = field(
        default="adaptive",
        metadata={"help": "Temperature of the loss: a positive number, or 'adaptive'."},
    )
    temperature_eta: float = field(
        default=0.25,
        metadata={"help": "Probability that the adaptive temperature aims to give the target."},
    )
    temperature_init: float = field(
        default=1.5,
        metadata={"help": "First value of the adaptive temperature."},
    )
    temperature_min: float = field(
        default=1.5,
        metadata={"help": "Lower bound on each new estimate of the adaptive temperature."},
    )
    temperature_max: float = field(
        default=5.0,
        metadata={"help": "Upper bound on each new estimate of the adaptive temperature."},
    )
    temperature_ema: float = field(
        default=0.05,
        metadata={"help": "Weight of a new estimate in the exponential moving average."},
    )
    temperature_warmup_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps during which the adaptive temperature stays at `temperature_init`."},
    )
    temperature_positions: str = field(
        default="first",
        metadata={
            "help": "Positions that the adaptive temperature is estimated from: 'first', where items begin to differ "
            "(the released code), or 'all' tokens of an item (Eq. 12 of the paper).",
            "choices": ["first", "all"],
        },
    )
    normalize: str = field(
        default="trie",
        metadata={
            "help": "What a target's probability is normalised over: the tokens that continue some item ('trie', MSL) "
            "or the whole vocabulary ('vocab', the usual loss).",
            "choices": ["trie", "vocab"],
        },
    )
    supervise_history: bool = field(
        default=False,
        metadata={"help": "Whether each item of the history is also a target, given the ones before it."},
    )
    negatives: str = field(
        default="all",
        metadata={
            "help": "Items that the wrong tokens come from in training: 'all' of the catalogue, or only those 'seen' "
            "as targets of training rows.",
            "choices": ["all", "seen"],
        },
    )
    num_negatives: int | None = field(
        default=None,
        metadata={"help": "Number of wrong tokens to draw where more are valid. Defaults to all of them."},
    )
    negative_scale: float = field(
        default=1.0,
        metadata={"help": "Factor on the sum over drawn negatives (scaled cross-entropy)."},
    )
    position_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights on the positions of the training loss: 'bear' (beam search) or 'igd' (information gain).",
            "choices": ["bear", "igd"],
        },
    )
    bear_beams: int = field(
        default=10,
        metadata={"help": "B of BEAR: number of beams of the search that it prepares for."},
    )
    bear_scale: float = field(
        default=2.75,
        metadata={"help": "ξ of BEAR: how gradually the weight changes around the B-th most probable token."},
    )
    bear_weight: float = field(
        default=0.25,
        metadata={"help": "λ of BEAR: weights lie between 1 and 1 + λ. Must be above -1."},
    )
    igd_weight: float = field(
        default=0.1,
        metadata={"help": "β of IGD: weight of tokens without information gain, between 0 and 1."},
    )
    log_lml_parts: bool = field(
        default=False,
        metadata={
            "help": "Whether to log the language modeling loss and its two parts, at the cost of a projection onto "
            "the whole vocabulary at each step."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Whether NaN and infinite losses are left out of the logged mean."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens of a prompt and an item. Defaults to that of the task."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.temperature != "adaptive":
            self.temperature = _positive("temperature", self.temperature, " or 'adaptive'")
        for name in ("temperature_init", "temperature_min", "temperature_max"):
            setattr(self, name, _positive(name, getattr(self, name)))
        if self.temperature_min > self.temperature_max:
            raise ValueError(
                f"`temperature_min` = {self.temperature_min} is above `temperature_max` = {self.temperature_max}."
            )
        if not 0 < self.temperature_eta < 1:
            raise ValueError(f"`temperature_eta` is {self.temperature_eta}: it must lie between 0 and 1.")
        if not 0 < self.temperature_ema <= 1:
            raise ValueError(f"`temperature_ema` is {self.temperature_ema}: it must be above 0 and at most 1.")
        choices = {
            "temperature_positions": ("first", "all"), "normalize": ("trie", "vocab"), "negatives": ("all", "seen")
        }  # fmt: skip
        for name, (one, other) in choices.items():
            if getattr(self, name) not in (one, other):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: it must be {one!r} or {other!r}.")
        self._check_loss()
        self._check_position_weights()
        self._reject_unsupported()

    def _check_loss(self) -> None:
        if self.num_negatives is not None and not (isinstance(self.num_negatives, int) and self.num_negatives > 0):
            raise ValueError(
                f"`num_negatives` is {self.num_negatives!r}: it must be a whole number above 0, or `None` for all."
            )
        self.negative_scale = _positive("negative_scale", self.negative_scale)
        if self.num_negatives is None and self.negative_scale != 1:
            raise ValueError(f"`negative_scale` = {self.negative_scale} is for drawn negatives: set `num_negatives`.")
        if self.temperature == "adaptive":
            for name, value in (("normalize", self.normalize != "trie"), ("num_negatives", self.num_negatives)):
                if value:
                    raise ValueError(
                        f"`temperature` = 'adaptive' is estimated from all valid tokens, which `{name}` = "
                        f"{getattr(self, name)!r} does not use: pass a number, such as 1.0."
                    )
        if self.normalize == "vocab" and self.negatives == "seen":
            raise ValueError("`negatives` = 'seen' has no meaning with `normalize` = 'vocab': leave one of them out.")
        if self.normalize == "vocab" and (self.num_negatives or (self.log_lml_parts and self.temperature != 1)):
            raise ValueError(
                "`normalize` = 'vocab' takes no `num_negatives`, and `log_lml_parts` only with `temperature` = 1."
            )
        if self.num_negatives and self.log_lml_parts:
            raise ValueError("`log_lml_parts` needs all valid tokens: leave it or `num_negatives` out.")

    def _check_position_weights(self) -> None:
        if self.position_weights not in (None, "bear", "igd"):
            raise ValueError(f"`position_weights` is {self.position_weights!r}: it must be 'bear', 'igd' or `None`.")
        if not (isinstance(self.bear_beams, int) and self.bear_beams > 0):
            raise ValueError(f"`bear_beams` is {self.bear_beams!r}: it must be a whole number above 0.")
        self.bear_scale = _positive("bear_scale", self.bear_scale)
        if not -1 < self.bear_weight < float("inf"):
            raise ValueError(f"`bear_weight` is {self.bear_weight}: it must be a number above -1.")
        if not 0 <= self.igd_weight <= 1:
            raise ValueError(f"`igd_weight` is {self.igd_weight}: it must lie between 0 and 1.")
        if self.position_weights == "bear" and (self.normalize != "trie" or self.num_negatives):
            raise ValueError(
                "`position_weights` = 'bear' compares the probabilities of all valid tokens: use `normalize` = 'trie' "
                "and no `num_negatives`."
            )
        if self.position_weights == "igd" and self.negatives == "seen":
            raise ValueError(
                "`position_weights` = 'igd' has no effect with `negatives` = 'seen', where tokens without information "
                "gain have no loss: leave one of them out."
            )

    def _reject_unsupported(self) -> None:
        """Raise for options of SFT that would change the loss's meaning, or have no effect on it."""
        reasons = {
            "loss_type": (self.loss_type in ("nll", "chunked_nll"), "this trainer has its own loss: leave it out"),
            "label_smoothing_factor": (self.label_smoothing_factor == 0, "it is not defined for this loss: use 0"),
            "completion_only_loss": (self.completion_only_loss is not False, "only items are supervised: use True"),
            "assistant_only_loss": (not self.assistant_only_loss, "use conversational prompt/completion rows"),
            "dataset_kwargs": (
                not (self.dataset_kwargs or {}).get("skip_prepare_dataset"),
                "rows must be checked; map `tokenize_rows` yourself instead",
            ),
            "packing_strategy": (
                not self.packing or self.packing_strategy != "wrapped",
                "it cuts rows, and their titles, at arbitrary places: use 'bfd'",
            ),
            "truncation_mode": (self.truncation_mode == "keep_start", "rows are shortened at their oldest item"),
        }
        for name, (supported, remedy) in reasons.items():
            if not supported:
                raise ValueError(f"`{name}` = {getattr(self, name)!r} is not supported by `MSLConfig`: {remedy}.")


def _positive(name: str, value: float | str, alternative: str = "") -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number < float("inf"):
        raise ValueError(f"`{name}` is {value!r}: it must be a positive number{alternative}.")
    return number
