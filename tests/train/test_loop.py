import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from dysurgery import TemperatureSchedule, convert, temperature
from dysurgery.errors import DysurgeryError
from dysurgery.train.digits import NarrowNet, digits
from dysurgery.train.loop import evaluate, train
from dysurgery.train.recipe import Training


def few(count=256):
    data, val = digits()
    return Subset(data, range(count)), Subset(val, range(100))


def test_training_learns():
    torch.manual_seed(0)
    model = NarrowNet()
    data, val = few(1000)
    history = train(model, data, val, Training(epochs=6), phase="x", seed=0)
    assert history[-1].loss < history[0].loss / 2
    assert history[-1].accuracy == evaluate(model, val) > 60
    assert [epoch.number for epoch in history] == [1, 2, 3, 4, 5, 6]


def test_tau_follows_its_schedule_and_stays_with_the_model():
    data, val = few()
    model = convert(NarrowNet(), torch.zeros(1, 1, 8, 8))
    seen = []
    gate = next(m for m in model.modules() if hasattr(m, "tau"))
    gate.register_forward_pre_hook(lambda m, args: seen.append(m.tau.item()) if m.training else None)
    schedule = TemperatureSchedule(start=10, end=1, warmup=1.5)
    train(model, data, val, Training(epochs=2, batch_size=64), phase="x", seed=0, temperature=schedule)
    assert seen == pytest.approx([schedule(step / 4) for step in range(8)])
    assert temperature(model) == 1


def test_the_same_seed_gives_the_same_network():
    data, val = few()
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        model = NarrowNet()
        train(model, data, val, Training(epochs=1), phase="x", seed=7)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    data, val = few()
    model = NarrowNet()
    nn.init.constant_(model[-1].bias, float("nan"))
    with pytest.raises(DysurgeryError, match=r"loss is nan in epoch 1, step 1 \(lr 0\.05, tau -\)"):
        train(model, data, val, Training(epochs=1), phase="x", seed=0)


def test_a_batch_larger_than_the_data_is_refused():
    data, val = few(32)
    with pytest.raises(DysurgeryError, match="batch_size"):
        train(NarrowNet(), data, val, Training(epochs=1), phase="x", seed=0)
