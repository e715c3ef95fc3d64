# SPDX-License-Identifier: Apache-2.0
"""Evaluation mode."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel


_lock = threading.Lock()
_num_uses: dict[nn.Module, int] = {}  # of each module that returns to training mode after the last of its uses


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """
    Evaluation mode without gradients; afterwards each module's own mode. Several threads may use a model, or parts of
    it, at once: a module stays in evaluation mode until the last of them is done.
    """
    with _lock:
        switched = [module for module in model.modules() if module.training or module in _num_uses]
        for module in switched:
            _num_uses[module] = _num_uses.get(module, 0) + 1
        if switched:
            model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        with _lock:
            for module in switched:
                _num_uses[module] -= 1
                if _num_uses[module] == 0:
                    del _num_uses[module]
                    module.training = True
