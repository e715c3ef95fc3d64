# SPDX-License-Identifier: Apache-2.0
"""What is known to go wrong, looked for in data, tokenizer and model."""

__all__ = []
