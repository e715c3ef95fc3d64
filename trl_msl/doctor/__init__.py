# SPDX-License-Identifier: Apache-2.0
"""Checks of data, tokenizer and model for known problems, before training."""

from .diagnose import diagnose
from .findings import Finding


__all__ = ["Finding", "diagnose"]
