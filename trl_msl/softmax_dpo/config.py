# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, field

from trl import DPOConfig

from ..training import TrainingConfigMixin


@dataclass
class SoftmaxDPOConfig(TrainingConfigMixin, DPOConfig):
    """
    Configuration class for the [`SoftmaxDPOTrainer`].

    This class includes only the parameters that [`~trl.DPOConfig`] does not have, or whose defaults differ. The
    paper's values are in Section 4.1 of [S-DPO](https://huggingface.co/papers/2406.09215).

    Parameters:
        beta (`float`, *optional*, defaults to `1.0`):
            Strength of the penalty for moving away from the reference model; 1 in the paper, 0.1 in
            [`~trl.DPOConfig`].
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            Initial learning rate; 1e-5 in the paper, 1e-6 in [`~trl.DPOConfig`].
        normalize (`str`, *optional*, defaults to `"trie"`):
            What a completion's probability is normalised over: `"trie"`, the tokens that continue some item, as in
            ranking; or `"vocab"`, the whole vocabulary, as published.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            As for [`MSLConfig`].
        max_length (`int`, *optional*):
            As for [`MSLConfig`].
    """

    beta: float = field(
        default=1.0,
        metadata={"help": "Strength of the penalty for moving away from the reference model; 1 in the S-DPO paper."},
    )
    learning_rate: float = field(
        default=1e-5,
        metadata={"help": "Initial learning rate; 1e-5 in the S-DPO paper."},
    )
    normalize: str = field(
        default="trie",
        metadata={
            "help": "What a completion's probability is normalised over: the tokens that continue some item ('trie'), "
            "or the whole vocabulary ('vocab'), as published.",
            "choices": ["trie", "vocab"],
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
        if self.normalize not in ("trie", "vocab"):
            raise ValueError(f"`normalize` is {self.normalize!r}: it must be 'trie' or 'vocab'.")
        if not self.beta > 0:
            raise ValueError(f"`beta` is {self.beta}: it must be positive.")
        # Options of DPO that this loss would silently ignore
        fixed = {
            "loss_type": ["sigmoid"],
            "loss_weights": None,
            "label_smoothing": 0.0,
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
            "use_weighting": False,
            "padding_free": False,
            "pad_token": None,
            "truncation_mode": "keep_start",
        }
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}` = {getattr(self, name)!r} is not supported by `SoftmaxDPOConfig`: leave it out. For "
                    "DPO's variants use TRL's `DPOTrainer` on rows with a single rejected completion."
                )
