# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from trl_msl import adaptive_temperature, masked_softmax_loss
from trl_msl.training import temperature_statistics


def random_positions(num_positions=6, num_tokens=9, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_positions, num_tokens, generator=generator, dtype=torch.float64)
    valid_mask = torch.rand(num_positions, num_tokens, generator=generator) < 0.6
    targets = torch.randint(num_tokens, (num_positions,), generator=generator)
    valid_mask[torch.arange(num_positions), targets] = True
    valid_mask[0] = torch.arange(num_tokens) == targets[0]  # a forced position
    return logits, valid_mask, targets


def written_out(logits, valid_mask, targets, temperature):
    losses = []
    for row, mask, target in zip(logits, valid_mask, targets):
        exponentials = torch.exp(row[mask] / temperature)
        losses.append(-temperature * torch.log(torch.exp(row[target] / temperature) / exponentials.sum()))
    return torch.stack(losses)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5, torch.tensor(2.5)])
def test_masked_softmax_loss_and_gradient_equal_the_equation(temperature):
    logits, valid_mask, targets = random_positions()
    fast, slow = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = masked_softmax_loss(fast, valid_mask, targets, temperature)
    expected = written_out(slow, valid_mask, targets, temperature)
    torch.testing.assert_close(losses, expected)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad)
    assert (fast.grad[~valid_mask] == 0).all()


def test_forced_positions_have_no_loss_and_no_gradient():
    logits, valid_mask, targets = random_positions()
    logits.requires_grad_()
    loss = masked_softmax_loss(logits, valid_mask, targets, 1.5)[0]
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_all_tokens_valid_is_cross_entropy():
    logits, _, targets = random_positions()
    losses = masked_softmax_loss(logits, torch.ones_like(logits, dtype=torch.bool), targets)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_large_and_low_precision_logits_stay_finite():
    logits, valid_mask, targets = random_positions(scale=300.0)
    exact = masked_softmax_loss(logits, valid_mask, targets, 0.5)
    low = masked_softmax_loss(logits.bfloat16(), valid_mask, targets, 0.5)
    assert torch.isfinite(exact).all()
    assert low.dtype == torch.float32
    rounding = (logits.bfloat16().double() - logits).abs().max() * 2
    assert (low - exact).abs().max() <= rounding


def test_no_positions_give_no_loss():
    logits = torch.zeros(0, 0, requires_grad=True)
    loss = masked_softmax_loss(logits, torch.zeros(0, 0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)).sum()
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match="`temperature` is"):
        masked_softmax_loss(*random_positions(), temperature)


# ---------------------------------------------------------------------- adaptive temperature


def approximate_log_probability(tau, difference, variance, num_valid):
    """Second-order expansion of log P(target) that Eq. 10 of the paper starts from."""
    return difference / tau - variance / (2 * tau**2) - math.log(num_valid)


def bisect(function, low, high):
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) * function(high) <= 0 else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize(("difference", "variance"), [(8.0, 2.0), (12.0, 4.0), (6.0, 0.5)])
def test_adaptive_temperature_is_the_larger_numerical_root(difference, variance):
    """The erratum: the plus root solves the equation and tends to d / C as the variance vanishes."""
    num_valid, eta = 64, 0.25
    c = math.log(num_valid * eta)
    statistics = torch.tensor([1.0, difference, 0.0, variance, variance, math.log(num_valid)], dtype=torch.float64)
    tau = float(adaptive_temperature(statistics, eta))
    peak = variance / difference  # the probability falls on both sides of it: the larger root lies above
    expected = bisect(
        lambda t: approximate_log_probability(t, difference, variance, num_valid) - math.log(eta), peak, 1e3
    )
    assert math.isclose(tau, expected, rel_tol=1e-9)
    minus_root = (difference - math.sqrt(difference**2 - 2 * variance * c)) / (2 * c)
    assert minus_root < peak < tau
    vanishing = torch.tensor([1.0, difference, 0.0, 1e-12, 1e-12, math.log(num_valid)], dtype=torch.float64)
    assert math.isclose(float(adaptive_temperature(vanishing, eta)), difference / c, rel_tol=1e-6)


def test_adaptive_temperature_gives_the_target_probability_eta():
    """On normal logits the expansion is exact in the limit of many tokens: the realised probability is about eta."""
    torch.manual_seed(0)
    logits = torch.randn(200, 4000, dtype=torch.float64)
    targets = torch.zeros(200, dtype=torch.int64)
    logits[:, 0] = 25.0
    mask = torch.ones_like(logits, dtype=torch.bool)
    mask_without_target = mask.clone()
    mask_without_target[:, 0] = False
    statistics = temperature_statistics(logits, mask, targets)
    # the one target hardly moves the mean, but its square does move the variance: leave it out, as σ² → background
    background = temperature_statistics(logits, mask_without_target, targets)
    statistics[2:5] = background[2:5]
    tau = float(adaptive_temperature(statistics, eta=0.25))
    probability = masked_softmax_loss(logits / tau, mask, targets).neg().exp().mean()
    assert 0.18 < probability < 0.27


def test_first_positions_equal_the_released_formula():
    """Pooled mean and variance over all valid logits of the rows, which all have the same number of valid tokens."""
    torch.manual_seed(0)
    logits, valid_mask = 2 * torch.randn(5, 30), torch.zeros(5, 30, dtype=torch.bool)
    valid_mask[:, 3:23] = True
    targets = torch.tensor([3, 4, 5, 6, 22])
    logits[torch.arange(5), targets] += 5
    tau = adaptive_temperature(temperature_statistics(logits, valid_mask, targets), eta=0.25)
    logits = logits.double()
    pooled = logits[valid_mask]
    difference = logits[torch.arange(5), targets].mean() - pooled.mean()
    c = math.log(20 * 0.25)
    expected = (difference + (difference**2 - 2 * c * pooled.var(correction=0)).clamp(min=0).sqrt()) / (2 * c)
    torch.testing.assert_close(tau, expected)


def test_all_positions_solve_eq_12_for_the_product_over_a_title():
    torch.manual_seed(1)
    logits, valid_mask = torch.randn(6, 40), torch.rand(6, 40) < 0.7  # two items of three positions each
    targets = torch.arange(6)
    valid_mask[torch.arange(6), targets] = True
    logits[torch.arange(6), targets] += 9
    tau = float(adaptive_temperature(temperature_statistics(logits, valid_mask, targets), eta=0.25, num_items=2))
    log_probability = 0.0
    for row, mask, target in zip(logits, valid_mask, targets):
        valid = row[mask]
        log_probability += approximate_log_probability(
            tau, float(row[target] - valid.mean()), float(valid.var(correction=0)), len(valid)
        )
    assert math.isclose(log_probability / 2, math.log(0.25), rel_tol=1e-4)


def test_statistics_add_up_over_micro_batches():
    logits, valid_mask, targets = random_positions()
    whole = temperature_statistics(logits, valid_mask, targets)
    parts = sum(
        temperature_statistics(logits[rows], valid_mask[rows], targets[rows]) for rows in (slice(0, 2), slice(2, 6))
    )
    torch.testing.assert_close(whole, parts)
    assert not whole.requires_grad


@pytest.mark.parametrize("num_items", [None, 5])
def test_a_common_offset_leaves_the_temperature_as_it_is(num_items):
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(5, 64, generator=generator)).mul(64).round() / 64  # which fp32 holds with the offset
    logits += torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0]).unsqueeze(1)  # the rows' means differ, and count when pooled
    targets = torch.arange(5)
    logits[torch.arange(5), targets] += 9
    valid_mask = torch.rand(5, 64, generator=generator).scatter(1, targets.unsqueeze(1), 0.0) < 0.7
    expected, found = (
        adaptive_temperature(temperature_statistics(logits + offset, valid_mask, targets), num_items=num_items)
        for offset in (0.0, 3000.0)
    )
    assert 0.5 < expected < 5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_few_valid_tokens_need_no_sharpening():
    statistics = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, math.log(3)])  # 3 * 0.25 < 1: uniform gives more than eta
    assert adaptive_temperature(statistics, eta=0.25) == math.inf


def test_bad_eta():
    with pytest.raises(ValueError, match="`eta` is 1.5"):
        adaptive_temperature(torch.ones(6), eta=1.5)


# ---------------------------------------------------------------------- scaled cross-entropy


def test_negative_scale_is_a_factor_on_the_wrong_tokens_terms():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (6,), generator=generator)
    valid = (torch.rand(6, 9, generator=generator) < 0.6).scatter(1, targets.unsqueeze(1), True)
    scale, temperature = torch.tensor([1.0, 1.0, 3.0, 3.0, 50.0, 0.5], dtype=torch.float64), 1.7
    losses = masked_softmax_loss(logits, valid, targets, temperature, scale)

    expected = []
    for row in range(6):
        terms = [(logits[row, z] / temperature).exp() for z in range(9)]
        wrong = sum(term for z, term in enumerate(terms) if valid[row, z] and z != targets[row])
        expected.append(-temperature * (terms[targets[row]] / (terms[targets[row]] + scale[row] * wrong)).log())
    torch.testing.assert_close(losses, torch.stack(expected))
    gradients = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (losses, sum(expected))]
    torch.testing.assert_close(*gradients)
    plain = masked_softmax_loss(logits, valid, targets, temperature)
    torch.testing.assert_close(losses[:2], plain[:2])
    assert (losses[2:5] > plain[2:5]).all() and losses[5] < plain[5]
