import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from dysurgery import set_temperature
from dysurgery.errors import UsageError
from dysurgery.nn import handler

SAME = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame)
STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def moved(static):
    """A convolution whose gain and bias are not what they start as."""
    for name, parameter in static.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if name == "gain" else 0.1)
    return static.double()


@pytest.mark.parametrize("size", [(7, 7), (8, 11), (5, 6)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "groups"), [(3, 1), ((5, 2), 4), (1, 1)])
@pytest.mark.parametrize("kind", SAME)
def test_the_padding_of_tensorflow_is_kept(kind, size, stride, kernel, groups):
    static = moved(kind(4, 8, kernel, stride=stride, dilation=1 if stride > 1 else 2, groups=groups))
    layer = handler(static).from_static(static, k=3)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), static(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", STANDARDISED)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 2, "bias": True}, {"eps": 0.5}])
def test_standardised_kernels_keep_the_output_at_any_temperature(kind, options):
    static = moved(kind(4, 6, 3, **options))
    layer = handler(static).from_static(static, k=4)
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    for tau in (1.0, 30.0, 0.3):
        set_temperature(layer, tau)
        torch.testing.assert_close(layer(x), static(x), rtol=1e-12, atol=1e-12)
    again = type(layer).like(static, **layer.options())
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x), static(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", STANDARDISED)
def test_each_kernel_of_the_bank_is_standardised_by_itself(kind):
    static = moved(kind(4, 6, 3))
    layer = handler(static).from_static(static, k=3)
    nn.init.normal_(layer.bank, mean=2.0, std=3.0)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    layer.gate.silence()
    for k in range(3):
        layer.gate.fc2.bias.data = 1000.0 * torch.eye(3, dtype=torch.float64)[k]  # all weight on this kernel
        static.weight.data = layer.bank[k].detach().view_as(static.weight)
        torch.testing.assert_close(layer(x), static(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("options", "words"), [({"start": "zero-sum"}, "copies"), ({"gate": "sigmoid"}, "softmax")])
def test_a_start_that_would_change_standardised_kernels_is_refused(options, words):
    static = StdConv2d(4, 6, 3)
    with pytest.raises(UsageError, match=words):
        handler(static).from_static(static, k=2, **options)
