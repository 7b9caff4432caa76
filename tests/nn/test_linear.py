import pytest
import torch
from torch import nn

from dysurgery.nn import DynamicLinear


def looped(layer, x):
    """The definition, for x (B, ..., Cin)."""
    rows = []
    for sample in x:
        pooled = sample.reshape(-1, sample.shape[-1]).mean(dim=0)
        pi = layer.gate(pooled.unsqueeze(0))[0]
        y = sample @ sum(pi[k] * layer.bank[k].view(layer.weight_shape) for k in range(layer.k)).T
        if layer.bias_bank is not None:
            y = y + sum(pi[k] * layer.bias_bank[k] for k in range(layer.k))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("shape", [(3, 6), (1, 6), (3, 5, 6), (2, 4, 5, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_a_loop_over_the_samples_in_values_and_gradients(shape, bias):
    layer = DynamicLinear(6, 4, bias, k=3, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, reference = layer(x), looped(layer, x)
    torch.testing.assert_close(y, reference)
    wanted = [x, *layer.parameters()]
    found, expected = (torch.autograd.grad(out.square().sum(), wanted) for out in (y, reference))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (3, 6), (3, 5, 6)])
def test_a_conversion_computes_what_the_linear_layer_did(gate, shape):
    static = nn.Linear(6, 4).double()
    layer = DynamicLinear.from_static(static, k=4, gate=gate)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), static(x))
