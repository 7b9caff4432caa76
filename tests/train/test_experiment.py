import pytest
import torch

from dysurgery import temperature
from dysurgery.nn import DynamicLayer
from dysurgery.train import load_recipe, run_recipe

SHORT = {"pretrain.epochs": 2, "finetune.epochs": 2, "temperature.warmup": 1}


@pytest.fixture(scope="module")
def outcome():
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    result = run_recipe(load_recipe("digits", SHORT))
    assert torch.equal(torch.random.get_rng_state(), before)
    return result


def test_the_conversion_keeps_the_accuracy(outcome):
    assert outcome.converted == outcome.before


def test_control_and_dynamic_are_trained_on_for_as_many_epochs(outcome):
    assert [epoch.phase for epoch in outcome.history] == ["before"] * 2 + ["control"] * 2 + ["dynamic"] * 2
    assert outcome.difference == outcome.dynamic - outcome.control
    assert outcome.history[-1].accuracy == outcome.dynamic


def test_the_outcome_holds_the_trained_dynamic_network_and_both_costs(outcome):
    assert temperature(outcome.model) == 1
    layers = [m for m in outcome.model.modules() if isinstance(m, DynamicLayer)]
    assert len(layers) == 3
    for layer in layers:
        assert (layer.bank - layer.bank.mean(0)).abs().max() > 0  # the kernels have moved apart
    static, dynamic = outcome.costs
    assert dynamic.params > static.params
    assert dynamic.mult_adds.total > static.mult_adds.total


def test_the_same_recipe_gives_the_same_figures(outcome):
    again = run_recipe(load_recipe("digits", SHORT))
    assert (again.before, again.control, again.dynamic) == (outcome.before, outcome.control, outcome.dynamic)
