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


@pytest.mark.parametrize(("gate", "start"), [("softmax", "copies"), ("softmax", "zero-sum"), ("sigmoid", "zero-sum")])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (0, 5, 6), (3, 6), (3, 5, 6), (2, 4, 5, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_conversion_computes_what_the_linear_layer_did(gate, start, shape, bias):
    static = nn.Linear(6, 4, bias).double()
    layer = DynamicLinear.from_static(static, k=4, gate=gate, start=start)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), static(x))


def test_an_empty_batch_trains():
    layer = DynamicLinear(6, 4)
    layer(torch.zeros(0, 6)).sum().backward()
    assert all(not p.grad.any() for p in layer.parameters())


def test_inputs_need_not_be_contiguous():
    layer = DynamicLinear(6, 4, dtype=torch.float64)
    x = torch.randn(6, 5, 4, 2, dtype=torch.float64).permute(3, 2, 1, 0)[:, ::2]
    torch.testing.assert_close(layer(x), looped(layer, x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_types(dtype, tolerance):
    static = nn.Linear(8, 8, dtype=dtype)
    layer = DynamicLinear.from_static(static, k=4, start="zero-sum")
    x = torch.randn(3, 5, 8, dtype=dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), static(x), rtol=tolerance, atol=tolerance)


def test_what_belongs_to_the_linear_layer_carries_over():
    static = nn.Linear(6, 4).eval()
    static.bias.requires_grad_(False)
    layer = DynamicLinear.from_static(static, k=4)
    assert not layer.training
    assert layer.bank.requires_grad
    assert not layer.bias_bank.requires_grad
