import pytest
import torch
from torch import nn

from dysurgery.errors import UsageError
from dysurgery.nn import GATES, DynamicConv2d, Gate, SigmoidGate, SoftmaxGate


def logits(gate, x):
    return gate.fc2(torch.relu(gate.fc1(x)))


def test_softmax_weights_sum_to_one_and_flatten_as_tau_grows():
    gate = SoftmaxGate(8, 4)
    x = torch.randn(5, 8)
    gate.tau.fill_(2.0)
    torch.testing.assert_close(gate(x), torch.softmax(logits(gate, x) / 2.0, dim=1))
    torch.testing.assert_close(gate(x).sum(1), torch.ones(5))
    sharp = gate(x).std()
    gate.tau.fill_(30.0)
    assert gate(x).std() < sharp


@pytest.mark.parametrize("tau", [1.0, 5.0])
def test_sigmoid_weights_are_independent(tau):
    gate = SigmoidGate(8, 4)
    gate.tau.fill_(tau)
    x = torch.randn(5, 8)
    torch.testing.assert_close(gate(x), torch.sigmoid(logits(gate, x) / tau))


@pytest.mark.parametrize("gate", GATES.values())
def test_a_silenced_gate_is_constant_at_any_temperature(gate):
    layer = gate(8, 4)
    layer.silence()
    first = layer(torch.randn(3, 8))
    layer.tau.fill_(30.0)
    torch.testing.assert_close(layer(torch.randn(3, 8)), first, rtol=0, atol=0)
    assert len(set(first.flatten().tolist())) == 1


@pytest.mark.parametrize(("channels", "reduction", "hidden"), [(64, 4, 16), (64, 16, 4), (8, 4, 4), (3, 4, 4)])
def test_the_hidden_width_is_a_fraction_of_the_channels_but_at_least_four(channels, reduction, hidden):
    assert SoftmaxGate(channels, 4, reduction).fc1.out_features == hidden


def test_weights_of_half_precision_layers_are_computed_in_float32():
    gate = SoftmaxGate(8, 4, dtype=torch.bfloat16)
    pi = gate(torch.randn(3, 8, dtype=torch.bfloat16))
    assert pi.dtype == torch.float32
    torch.testing.assert_close(pi.sum(1), torch.ones(3))


def test_an_unknown_gate_is_an_error_with_near_names():
    with pytest.raises(UsageError, match="did you mean 'softmax'"):
        DynamicConv2d(4, 6, 3, gate="sofmax")


def test_a_third_gate_is_a_class_and_a_table_entry(monkeypatch):
    class Doubled(Gate):
        name, sums_to_one = "doubled", False

        @staticmethod
        def weights(z, tau):
            return 2 * torch.softmax(z / tau, dim=-1)

    monkeypatch.setitem(GATES, "doubled", Doubled)
    static = nn.Conv2d(4, 6, 3).double()
    layer = DynamicConv2d.from_static(static, k=4, gate="doubled")
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), static(x))
