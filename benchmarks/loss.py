# SPDX-License-Identifier: Apache-2.0
"""
Forward and backward of LM head and loss, given the hidden states: the sparse head with masked softmax loss, against

- dense: logits of every token, prompts included, of which those of the titles are masked by one bool mask over the
  vocabulary per title token, as the released code of the MSL paper does (without the unused loss over all logits that
  it also lets the model compute);
- TRL's fused LM head, which computes plain language modeling, not MSL. Without Triton it scores every position.

Both are also measured on the title's positions alone, which is the least that a full softmax needs: the keys that end
in `_title_only`. The head is frozen, as under LoRA, except for the keys that end in `_trainable_head`.
"""

import statistics
from collections.abc import Callable

import torch
from catalogs import VOCAB_SIZE, load_books
from timing import peak_memory, summarize, time_calls
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from trl.trainer.utils import add_fused_lm_head

from trl_msl import ItemTrie, masked_softmax_loss
from trl_msl.training import add_sparse_lm_head


BATCH_SIZE, PROMPT_LENGTH, HIDDEN_SIZE = 8, 200, 1_024


class StoredStates(nn.Module):
    """A stand-in for a backbone: returns the hidden states stored in it."""

    hidden: Tensor

    def forward(self, **kwargs) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.hidden)


class HeadOnlyModel(PreTrainedModel):
    """A causal language model that consists of its head alone."""

    config_class = PretrainedConfig
    base_model_prefix = "backbone"

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.backbone = StoredStates()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, **kwargs) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.backbone(**kwargs).last_hidden_state))


class Steps:
    """
    The steps to compare: forward and backward on the same hidden states, model and titles.

    Args:
        trie (`ItemTrie`):
            Trie of the catalogue.
        paths (`torch.Tensor` of shape `(batch_size, title_length)`, int64):
            Nodes of each row's title, padded with `-1` on the right.
    """

    def __init__(self, trie: ItemTrie, paths: Tensor):
        torch.manual_seed(0)
        self.model = HeadOnlyModel(PretrainedConfig(hidden_size=HIDDEN_SIZE, vocab_size=VOCAB_SIZE))
        self.model.requires_grad_(False)
        add_fused_lm_head(self.model)
        add_sparse_lm_head(self.model, trie)
        on_path = paths >= 0
        # Left padding: every title ends with its row
        shift = (~on_path).sum(dim=1, keepdim=True)
        columns = torch.arange(paths.shape[1]) - shift
        title_nodes = torch.where(columns >= 0, paths.gather(1, columns.clamp(min=0)), -100)
        self.title_tokens = torch.where(columns >= 0, trie.tokens(title_nodes.clamp(min=0)), -100)
        no_labels = torch.full((len(paths), PROMPT_LENGTH), -100)
        self.nodes = torch.cat([no_labels, title_nodes], dim=1)
        self.tokens = torch.cat([no_labels, self.title_tokens], dim=1)
        self.masks = torch.stack([trie.valid_mask(trie.parents(row.clamp(min=0))) for row in title_nodes])
        self.num_positions = int((trie.num_valid_tokens(paths[on_path]) > 1).sum())
        self.hidden = torch.randn(*self.nodes.shape, HIDDEN_SIZE, requires_grad=True)

    def sparse(self) -> Tensor:
        """Our sparse head and masked softmax loss."""
        self.reset(self.hidden)
        output = self.model(labels=self.nodes, sparse_lm_head=True)
        loss = masked_softmax_loss(output.logits, output.valid_mask, output.targets).mean()
        loss.backward()
        return loss

    def dense(self) -> Tensor:
        """All logits, then a masked softmax over the vocabulary at the title's positions."""
        self.reset(self.hidden)
        return self._dense_loss()

    def dense_title_only(self) -> Tensor:
        """The same from the last positions' logits alone, as `logits_to_keep` would give them."""
        self.reset(self._title_states())
        return self._dense_loss()

    def fused(self) -> Tensor:
        """TRL's fused head, at every position where there is no Triton."""
        self.reset(self.hidden)
        loss = self.model(labels=self.tokens, fused_lm_head=True).loss
        loss.backward()
        return loss

    def fused_title_only(self) -> Tensor:
        """TRL's fused head on the last positions alone."""
        self.reset(self._title_states())
        loss = self.model(shift_labels=self.title_tokens, fused_lm_head=True).loss
        loss.backward()
        return loss

    def reset(self, hidden: Tensor) -> None:
        """Clear the gradients, and make the backbone return these states."""
        self.hidden.grad = self.model.lm_head.weight.grad = None
        self.model.backbone.hidden = hidden

    def _title_states(self) -> Tensor:
        return self.hidden[:, PROMPT_LENGTH - 1 : -1]

    def _dense_loss(self) -> Tensor:
        logits = self.model().logits
        if logits.shape[1] > self.masks.shape[1]:
            logits = logits[:, PROMPT_LENGTH - 1 : -1]
        logits = logits.masked_fill(~self.masks, -torch.inf)
        supervised = self.title_tokens != -100
        # Positions with a single valid token contribute zero; the mean is over the others
        loss = nn.functional.cross_entropy(logits[supervised], self.title_tokens[supervised], reduction="sum")
        loss = loss / self.num_positions
        loss.backward()
        return loss


def benchmark_loss(rounds: int = 2) -> dict:
    """Time and extra peak memory of head and loss; see the module's docstring."""
    books = load_books()
    steps = Steps(books.trie, books.paths(BATCH_SIZE, seed=0))
    for reference in (steps.dense, steps.dense_title_only):
        _check_equal(steps, reference)
    functions = {
        f"loss_{name}": getattr(steps, name)
        for name in ("sparse", "dense", "dense_title_only", "fused", "fused_title_only")
    }
    results = {
        "catalogue": books.source,
        "batch_size": BATCH_SIZE,
        "tokens": steps.nodes.numel(),
        "title_tokens": int((steps.nodes != -100).sum()),
        "branching_positions": steps.num_positions,
        "hidden_size": HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
    }
    results |= summarize(time_calls(functions, rounds, {"loss_sparse": 20}, warmup=0))
    results |= _benchmark_trainable_head(steps)
    for name, repeats in (("sparse", 5), ("dense", 1), ("fused", 1)):
        results[f"loss_{name}_peak_mb"] = _peak_mb(steps, name, repeats)
    results |= {
        f"loss_vs_{key}": results[f"loss_{name}_s"] / results["loss_sparse_s"]
        for name, key in [
            ("dense", "dense"),
            ("dense_title_only", "dense_title_only"),
            ("fused", "trl_fused"),
            ("fused_title_only", "trl_fused_title_only"),
        ]
    }
    if results["loss_dense_peak_mb"] is not None:
        results["loss_memory_vs_dense"] = results["loss_sparse_peak_mb"] / results["loss_dense_peak_mb"]
        results["loss_memory_vs_trl_fused"] = results["loss_sparse_peak_mb"] / results["loss_fused_peak_mb"]
    return results


def _benchmark_trainable_head(steps: Steps) -> dict:
    """As under full fine-tuning: every variant also makes a gradient of the size of the head."""
    steps.model.lm_head.weight.requires_grad_(True)
    functions = {f"loss_{name}_trainable_head": getattr(steps, name) for name in ("sparse", "dense")}
    results = summarize(time_calls(functions, rounds=2, calls_per_round={"loss_sparse_trainable_head": 5}))
    steps.model.lm_head.weight.requires_grad_(False)
    steps.model.lm_head.weight.grad = None
    ratio = results["loss_dense_trainable_head_s"] / results["loss_sparse_trainable_head_s"]
    return results | {"loss_vs_dense_trainable_head": ratio}


def _peak_mb(steps: Steps, name: str, repeats: int) -> float | None:
    """Extra peak memory of a step, the gradient of the hidden states included; `None` where it can't be measured."""
    peaks = []
    for _ in range(repeats):
        steps.reset(steps.hidden)
        peaks.append(peak_memory(getattr(steps, name)))
    return None if None in peaks else statistics.median(peaks) / 1e6


def _check_equal(steps: Steps, reference: Callable[[], Tensor]) -> None:
    """The sparse loss and its gradient must be those of the reference. Warms both up."""
    loss, gradient = steps.sparse().detach(), steps.hidden.grad
    torch.testing.assert_close(reference().detach(), loss, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(steps.hidden.grad, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
