import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dysurgery
from dysurgery.nn import DynamicLayer
from dysurgery.train import parameter_groups
from dysurgery.train.groups import BankRates


def network():
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU())
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).double()


def change_after_one_step(model, opt):
    """How one SGD step moves the outputs on the batch it was taken on."""
    torch.manual_seed(1)
    x, y = torch.randn(64, 3, 10, 10, dtype=torch.float64), torch.randint(0, 5, (64,))
    before = model(x)
    F.cross_entropy(before, y).backward()
    opt.step()
    return (model(x) - before).detach()


@pytest.mark.parametrize("start", ["copies", "zero-sum"])
def test_one_sgd_step_of_a_fresh_conversion_changes_the_output_as_much_as_one_of_the_static(start):
    static = network()
    dynamic = dysurgery.convert(static, torch.randn(1, 3, 10, 10, dtype=torch.float64), layers="all", start=start)
    dysurgery.set_temperature(dynamic, 30.0)
    moved = [
        change_after_one_step(model, torch.optim.SGD(parameter_groups(model, "sgd", 0.05, 0.0)))
        for model in (static, dynamic)
    ]
    ratio = moved[1].norm() / moved[0].norm()
    assert ratio == pytest.approx(1.0, abs=0.02)
    assert F.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0) > 0.999


def test_without_the_groups_the_convolutions_move_k_times_slower():
    static = network()
    dynamic = dysurgery.convert(static, torch.randn(1, 3, 10, 10, dtype=torch.float64), layers="all")
    dysurgery.set_temperature(dynamic, 30.0)
    for model in (static, dynamic):
        model[-1].requires_grad_(False)
    plain = change_after_one_step(dynamic, torch.optim.SGD(copy.copy(list(dynamic.parameters())), lr=0.05))
    wanted = change_after_one_step(static, torch.optim.SGD(static.parameters(), lr=0.05))
    assert plain.norm() / wanted.norm() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("logits", [(0, 0, 0, 0), (3, 0, 0, 0), (40, 0, -40, -40)])
def test_the_mixed_kernel_moves_as_fast_as_the_static_one_however_sharp_the_attention(gate, logits):
    static = network()
    dynamic = dysurgery.convert(static, torch.randn(1, 3, 10, 10, dtype=torch.float64), layers="all", gate=gate)
    for layer in dynamic.modules():
        if isinstance(layer, DynamicLayer):
            layer.gate.silence()
            layer.gate.fc2.bias.data = torch.tensor(logits, dtype=torch.float64)
            now = layer.gate.weights(layer.gate.fc2.bias.data[None], torch.ones(())).sum()
            for bank in (layer.bank.data, layer.bias_bank.data):  # equal kernels, mixed to the static one
                bank[:] = bank.mean(dim=0) * (1 if gate == "softmax" else 2) / now
    optimizer = torch.optim.SGD(parameter_groups(dynamic, "sgd", 0.05, 0.0, attention_lr=0))
    rates = BankRates(dynamic, optimizer)
    before = [group["lr"] for group in optimizer.param_groups]

    class Optimizer:
        def step(self):
            with rates.applied():
                optimizer.step()

    moved = change_after_one_step(dynamic, Optimizer())
    wanted = change_after_one_step(static, torch.optim.SGD(static.parameters(), 0.05))
    assert moved.norm() / wanted.norm() == pytest.approx(1.0, abs=0.02)
    assert F.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.999
    assert before == [group["lr"] for group in optimizer.param_groups]


def test_banks_get_k_times_the_rate_and_a_kth_of_the_decay_under_sgd_only():
    dynamic = dysurgery.convert(network(), torch.randn(1, 3, 10, 10, dtype=torch.float64), layers="all", k=8)
    banks = {id(m.bank) for m in dynamic.modules() if isinstance(m, DynamicLayer)}
    for opt, factor in (("sgd", 8), ("adamw", 1)):
        groups = parameter_groups(dynamic, opt, 0.1, 0.01)
        for group in groups:
            if any(id(p) in banks for p in group["params"]):
                assert (group["lr"], group["weight_decay"]) == pytest.approx((0.1 * factor, 0.01 / factor))
        listed = [id(p) for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in dynamic.parameters())


def test_frozen_parameters_are_in_no_group_and_vectors_do_not_decay():
    model = network()
    model[0].requires_grad_(False)
    groups = parameter_groups(model, "sgd", 0.1, 0.01)
    listed = {id(p) for group in groups for p in group["params"]}
    assert listed == {id(p) for p in model.parameters() if p.requires_grad}
    for group in groups:
        if group["weight_decay"]:
            assert all(p.ndim > 1 for p in group["params"])
