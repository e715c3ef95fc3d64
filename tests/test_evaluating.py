# SPDX-License-Identifier: Apache-2.0
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import make_model

from trl_msl.model import evaluating


@pytest.fixture
def model(tokenizer):
    model = make_model(tokenizer).train()
    model.model.norm.eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_each_module_gets_its_own_mode_back(model):
    before = modes(model)
    with pytest.raises(KeyError), evaluating(model):
        assert not any(modes(model)) and not torch.is_grad_enabled()
        raise KeyError
    assert modes(model) == before and torch.is_grad_enabled()


def test_uses_that_overlap(model):
    """The first ends before the second, which is of a part of the model."""
    before = modes(model)
    first, second = evaluating(model), evaluating(model.model)
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert not any(modes(model.model)) and model.lm_head.training and model.training
        other.submit(second.__exit__, None, None, None).result()
    assert modes(model) == before


def test_a_model_in_evaluation_mode_stays_in_it(model):
    model.eval()
    with evaluating(model), evaluating(model):
        assert not any(modes(model))
    assert not any(modes(model))


def test_many_threads(model):
    before, barrier = modes(model), threading.Barrier(8)

    def use(_):
        barrier.wait()
        wrong = 0
        for _ in range(200):
            with evaluating(model):
                wrong += sum(modes(model))
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(use, range(8))) == 0
    assert modes(model) == before
