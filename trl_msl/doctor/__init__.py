# SPDX-License-Identifier: Apache-2.0
"""Known problems of recommenders of this kind, looked for in data, tokenizer and model before training."""

from .diagnose import diagnose
from .findings import Finding


__all__ = ["Finding", "diagnose"]
