# SPDX-License-Identifier: Apache-2.0
"""Small models with Llama 3's vocabulary."""

import torch
from catalogs import VOCAB_SIZE
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(hidden_size: int, num_layers: int, sharpness: float = 1.0) -> LlamaForCausalLM:
    """A Llama with random weights, its matrices multiplied by `sharpness`: the larger, the more confident it is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(sharpness)
    return model
