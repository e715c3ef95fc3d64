# SPDX-License-Identifier: Apache-2.0
"""What is known to go wrong, looked for in data, tokenizer and model."""

from .checks import Finding
from .diagnose import diagnose


__all__ = ["Finding", "diagnose"]
