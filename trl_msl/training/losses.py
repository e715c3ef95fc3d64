# SPDX-License-Identifier: Apache-2.0
"""Masked softmax loss, BEAR's weights, adaptive temperature and softmax DPO, as pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def masked_softmax_loss(
    logits: Tensor,
    valid_mask: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    negative_scale: Tensor | None = None,
) -> Tensor:
    r"""
    Masked softmax loss (MSL) of each position: Eq. 5 of the [MSL paper](https://huggingface.co/papers/2504.04178), and
    with a temperature Eq. 9:

    $$ -\tau \log \frac{\exp(f_y / \tau)}{\sum_{z \text{ valid}} \exp(f_z / \tau)} $$

    The factor τ keeps the gradient's scale when τ changes. Where a single token is valid, the loss and its gradient
    are exactly zero, so such positions can be left out.

    Args:
        logits (`torch.Tensor` of shape `(num_positions, num_tokens)`):
            Logits, over the vocabulary or any part of it that holds the valid tokens. Computed in fp32 or wider.
        valid_mask (`torch.Tensor` of shape `(num_positions, num_tokens)`, bool):
            Which tokens continue some item.
        targets (`torch.Tensor` of shape `(num_positions,)`, int64):
            Column of the right token, which must be valid.
        temperature (`float` or scalar `torch.Tensor`, *optional*, defaults to `1.0`):
            τ. No gradient flows into it.
        negative_scale (`torch.Tensor` of shape `(num_positions,)`, *optional*):
            Factor α on the wrong tokens' terms of the sum, for positions with only a sample of them: the scaled
            cross-entropy (SCE) of [Xu et al.](https://huggingface.co/papers/2408.14238).

    Returns:
        `torch.Tensor` of shape `(num_positions,)`.

    Example:

    ```python
    >>> import torch
    >>> from trl_msl import masked_softmax_loss

    >>> logits, valid_mask = torch.tensor([[1.0, 1.0, 99.0]]), torch.tensor([[True, True, False]])
    >>> masked_softmax_loss(logits, valid_mask, torch.tensor([0]))  # log 2: the third token does not count
    tensor([0.6931])

    ```
    """
    if not torch.is_tensor(temperature) and not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}: it must be positive.")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target_logits = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    valid_logits = logits.masked_fill(~valid_mask, -math.inf)
    scaled = valid_logits / temperature
    if negative_scale is not None:
        is_target = torch.arange(logits.shape[-1], device=logits.device) == targets.unsqueeze(-1)
        scaled = torch.where(is_target, scaled, scaled + negative_scale.log().unsqueeze(-1))
    return temperature * torch.logsumexp(scaled, dim=-1) - target_logits


def bear_weights(
    logits: Tensor,
    valid_mask: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    num_beams: int = 10,
    scale: float = 2.75,
    weight: float = 0.25,
) -> Tensor:
    r"""
    Weight of each position by BEAR ([Beam-Search-Aware Optimization for Recommendation with Large Language
    Models](https://huggingface.co/papers/2601.22925)), as its authors'
    [code](https://github.com/Tiny-Snow/BEAR-SIGIR-2026) computes it:

    $$ w = 1 + \lambda \, \sigma\Big(\frac{\log p_y - \log p_B}{\xi}\Big) $$

    where $p_y$ is the target's probability among the valid tokens and $p_B$ the B-th largest one (the smallest, if
    fewer are valid), below which a beam search with B beams would drop the target.

    The paper adds $\lambda' \log \sigma((\log p_B - \log p_y) / \xi)$ to $-\log p_y$ instead. With $p_B$ constant,
    that has the same gradient, where $\lambda = \lambda' / \xi$. Note the sign: the weight is larger for targets
    *inside* the B best, since $\log \sigma$ is flat for those far outside, although it is these that are dropped.

    Args:
        logits, valid_mask, targets, temperature:
            As for [`masked_softmax_loss`]; all valid tokens are needed.
        num_beams (`int`, *optional*, defaults to `10`):
            B.
        scale (`float`, *optional*, defaults to `2.75`):
            ξ.
        weight (`float`, *optional*, defaults to `0.25`):
            λ, above -1. A negative one favours targets outside the B best.

    Returns:
        `torch.Tensor` of shape `(num_positions,)`, detached, between 1 and 1 + λ.
    """
    logits = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
    target_logits = logits.gather(-1, targets.unsqueeze(-1))
    best = logits.masked_fill(~valid_mask, -math.inf).topk(min(num_beams, logits.shape[-1])).values
    place = valid_mask.sum(dim=-1, keepdim=True).clamp(max=num_beams) - 1
    # A difference of log-probabilities of one position is that of its logits
    margin = (target_logits - best.gather(-1, place)).squeeze(-1) / temperature
    return 1 + weight * torch.sigmoid(margin / scale)


def temperature_statistics(logits: Tensor, valid_mask: Tensor, targets: Tensor) -> Tensor:
    """
    Sums over positions, from which [`adaptive_temperature`] computes the temperature. They add up over micro-batches
    and ranks.

    Args:
        logits, valid_mask, targets:
            As for [`masked_softmax_loss`].

    Returns:
        `torch.Tensor` of shape `(6,)`: the number of positions, and the sums over them of the target's logit, of the
        mean, the mean square and the variance of the valid logits, and of the logarithm of their number. Detached;
        float64, so that a large offset common to all logits costs no precision.
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    logits = logits.detach()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    num_valid = valid_mask.sum(dim=-1)
    target_logits = logits.gather(-1, targets.unsqueeze(-1))
    # Relative to the target's logit there is no large offset: only the rows' results need the wider type
    relative = (logits - target_logits) * valid_mask
    relative_mean = relative.sum(dim=-1) / num_valid
    deviation = (relative - relative_mean.unsqueeze(-1)) * valid_mask
    variance = (deviation.square().sum(dim=-1) / num_valid).to(wide)
    target_logits = target_logits.squeeze(-1).to(wide)
    mean = target_logits + relative_mean
    columns = [torch.ones_like(mean), target_logits, mean, mean.square() + variance, variance, num_valid.log()]
    return torch.stack(columns, dim=-1).sum(dim=0)


def adaptive_temperature(statistics: Tensor, eta: float = 0.25, num_items: float | Tensor | None = None) -> Tensor:
    r"""
    Temperature at which the target's restricted probability is about η: Eq. 10-12 of the
    [MSL paper](https://huggingface.co/papers/2504.04178).

    With `m` valid tokens of mean logit μ and variance σ², and the target's logit `μ + d`, a second-order expansion of
    the log-partition function turns `log P(target) = log η` into

    $$ \frac{d}{\tau} - \frac{\sigma^2}{2\tau^2} = C, \quad C = \log(m \eta), \qquad
       \tau = \frac{d + \sqrt{\max(d^2 - 2 \sigma^2 C, 0)}}{2C} $$

    **Erratum.** The paper prints a minus before the root (Eq. 11-12). That root of the quadratic tends to 0 as
    σ → 0, where the exact answer is `d / C`: the plus root. The authors' released code has the plus, too.

    Where `C ≤ 0` even the uniform distribution gives the target more than η: the answer is `inf`, to be clamped.

    Args:
        statistics (`torch.Tensor` of shape `(6,)`):
            Sum of [`temperature_statistics`] over a batch with at least one position.
        eta (`float`, *optional*, defaults to `0.25`):
            η, the probability that the target should have.
        num_items (`float` or `torch.Tensor`, *optional*):
            If `None`, each position is to have probability η, and the valid logits of all positions are pooled, as in
            the released code, for the positions where items begin to differ. Otherwise the number of items that the
            positions belong to: each *item*, the product over its positions, is to have probability η (Eq. 12).

    Returns:
        scalar `torch.Tensor`.
    """
    if not 0 < eta < 1:
        raise ValueError(f"`eta` is {eta}: it must lie between 0 and 1.")
    count, target, mean, mean_square, variance, log_num_valid = statistics
    divisor = count if num_items is None else num_items
    difference, variance, c = (target - mean) / divisor, variance / divisor, log_num_valid / divisor + math.log(eta)
    if num_items is None:
        variance = mean_square / count - (mean / count).square()
    root = (difference.square() - 2 * variance * c).clamp(min=0).sqrt()
    return torch.where(c > 0, (difference + root) / (2 * c), math.inf)


def softmax_dpo_loss(
    chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, beta: float, rejected_mask: Tensor | None = None
) -> Tensor:
    r"""
    Softmax DPO loss of each prompt, with several rejected completions: the S-DPO loss of [On Softmax Direct Preference
    Optimization for Recommendation](https://huggingface.co/papers/2406.09215), Section 3:

    $$ -\log \sigma\Big(-\log \sum_i \exp\big(\beta (\Delta_{\text{rejected}, i} - \Delta_{\text{chosen}})\big)\Big) $$

    where $\Delta$ is a completion's log-probability under the policy less that under the reference model. With a
    single rejected completion it is the loss of DPO (`loss_type="sigmoid"` in TRL).

    Args:
        chosen_log_ratios (`torch.Tensor` of shape `(num_prompts,)`):
            $\Delta$ of the chosen completion.
        rejected_log_ratios (`torch.Tensor` of shape `(num_prompts, num_rejected)`):
            $\Delta$ of the rejected ones.
        beta (`float`):
            β, how strongly to keep to the reference model.
        rejected_mask (`torch.Tensor` of shape `(num_prompts, num_rejected)`, bool, *optional*):
            Which rejected completions exist, at least one for each prompt. Defaults to all.

    Returns:
        `torch.Tensor` of shape `(num_prompts,)`.

    Example:

    ```python
    >>> import torch
    >>> from trl_msl.training import softmax_dpo_loss

    >>> softmax_dpo_loss(torch.tensor([0.0]), torch.tensor([[0.0, 0.0, 0.0]]), beta=1.0)  # log 4: one of four equals
    tensor([1.3863])

    ```
    """
    margins = beta * (rejected_log_ratios - chosen_log_ratios.unsqueeze(-1))
    if rejected_mask is not None:
        margins = margins.masked_fill(~rejected_mask, -math.inf)
    return torch.nn.functional.softplus(torch.logsumexp(margins, dim=-1))  # -log sigmoid(-x) = softplus(x)
