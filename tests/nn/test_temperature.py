import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dysurgery
from dysurgery import TemperatureSchedule, UsageError, set_temperature, temperature
from dysurgery.nn.temperature import SHAPES


def test_the_papers_schedule_goes_from_30_to_1_over_10_epochs_and_stays():
    schedule = TemperatureSchedule()
    assert [schedule(epoch) for epoch in range(11)] == pytest.approx([30 - 2.9 * epoch for epoch in range(11)])
    assert [schedule(progress) for progress in (0, 5, 10, 300)] == [30, 15.5, 1, 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(list(SHAPES)), st.floats(0, 20), st.floats(0.1, 50), st.floats(0.1, 50), st.floats(0, 10))
def test_every_shape_begins_at_its_start_ends_at_its_end_and_stays_between(shape, progress, start, end, warmup):
    schedule = TemperatureSchedule(start, end, warmup, shape)
    tau = schedule(progress)
    assert min(start, end) * (1 - 1e-9) <= tau <= max(start, end) * (1 + 1e-9)
    assert schedule(warmup) == end
    if warmup:
        assert schedule(0) == pytest.approx(start)
    assert tau == TemperatureSchedule(start, end, warmup, shape)(progress)


@pytest.mark.parametrize(
    "bad",
    [{"start": 0}, {"end": -1}, {"start": float("nan")}, {"warmup": -1}, {"shape": "square"}, {"end": float("inf")}],
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(UsageError):
        TemperatureSchedule(**bad)


def test_an_unknown_shape_is_an_error_with_near_names():
    with pytest.raises(UsageError, match="did you mean 'linear'"):
        TemperatureSchedule(shape="liner")


def test_tau_is_set_in_every_gate_and_read_back():
    model = nn.Sequential(dysurgery.DynamicConv2d(3, 4, 3), nn.Sequential(dysurgery.DynamicLinear(4, 4)))
    assert temperature(model) == 1
    set_temperature(model, 12.5)
    assert temperature(model) == 12.5
    assert all(torch.equal(v, torch.tensor(12.5)) for k, v in model.state_dict().items() if k.endswith("tau"))


def test_gates_that_only_round_differently_do_not_disagree():
    model = nn.Sequential(dysurgery.DynamicConv2d(3, 4, 3), dysurgery.DynamicConv2d(4, 4, 3).bfloat16())
    for tau in (29.7, 15.45, 1.01):
        set_temperature(model, tau)
        assert temperature(model) == pytest.approx(tau)


def test_gates_that_disagree_and_models_without_gates_are_errors():
    model = nn.Sequential(dysurgery.DynamicConv2d(3, 4, 3), dysurgery.DynamicConv2d(4, 4, 3))
    set_temperature(model[0], 3.0)
    with pytest.raises(UsageError, match="1 to 3"):
        temperature(model)
    for call in (temperature, lambda m: set_temperature(m, 2.0)):
        with pytest.raises(UsageError, match="convert it first"):
            call(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_positive_and_finite(tau):
    with pytest.raises(UsageError, match="positive"):
        set_temperature(dysurgery.DynamicConv2d(3, 4, 3), tau)
