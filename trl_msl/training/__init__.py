# SPDX-License-Identifier: Apache-2.0
"""Masked softmax loss: pure functions, the sparse head, the trainer."""

from .hub import NEVER_PUSHED
from .item_vector_curriculum import ItemVectorCurriculum
from .losses import adaptive_temperature, masked_softmax_loss, softmax_dpo_loss, temperature_statistics
from .msl_config import MSLConfig, TrainingConfigMixin
from .msl_trainer import MSLTrainer
from .resuming import ResumableTrainerMixin, differences, last_complete_checkpoint, warn_of_missing_state
from .sparse_head import SparseCausalLMOutput, SparseHeadOptions, add_sparse_lm_head
from .task_trainer import TaskTrainerMixin
from .temperature import TemperatureCallback


__all__ = [
    "ItemVectorCurriculum",
    "MSLConfig",
    "MSLTrainer",
    "NEVER_PUSHED",
    "ResumableTrainerMixin",
    "SparseCausalLMOutput",
    "SparseHeadOptions",
    "TaskTrainerMixin",
    "TemperatureCallback",
    "TrainingConfigMixin",
    "adaptive_temperature",
    "add_sparse_lm_head",
    "differences",
    "last_complete_checkpoint",
    "masked_softmax_loss",
    "softmax_dpo_loss",
    "temperature_statistics",
    "warn_of_missing_state",
]
