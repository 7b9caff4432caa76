import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from dysurgery.errors import UsageError
from dysurgery.nn import handler
from dysurgery.nn.layer import WAS_DYNAMIC

CASES = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, dilation=2), (4, 12)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding="valid", groups=2, bias=False), (4, 9, 9)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 9, 9)),
    "same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 2), (4, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5, 6)),
    "linear": (nn.Linear(4, 6), (4,)),
    "rows": (nn.Linear(4, 6, bias=False), (5, 4)),
    "Conv2dSame": (Conv2dSame(4, 6, 3, stride=2), (4, 9, 9)),
    "StdConv2d": (StdConv2d(4, 6, 3, padding=1), (4, 9, 9)),
    "StdConv2dSame": (StdConv2dSame(4, 6, 3, stride=2), (4, 9, 9)),
    "fixed padding": (StdConv2dSame(4, 6, 3, padding=""), (4, 9, 9)),
    "ScaledStdConv2d": (ScaledStdConv2d(4, 6, 3, padding=1), (4, 9, 9)),
    "ScaledStdConv2dSame": (ScaledStdConv2dSame(4, 6, 3, stride=2), (4, 9, 9)),
}
PLAIN = {StdConv2d: nn.Conv2d, ScaledStdConv2d: nn.Conv2d, StdConv2dSame: Conv2dSame, ScaledStdConv2dSame: Conv2dSame}


def with_constant_attention(static, pi):
    """A dynamic layer of different kernels whose attention gives pi whatever it sees."""
    layer = handler(static).from_static(static, k=len(pi))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.gate.silence()
    layer.gate.fc2.bias.data = pi.log()
    return layer.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_constant_attention_makes_a_static_layer_of_the_plain_class(case):
    static, shape = CASES[case]
    static = static.double()
    pi = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    layer = with_constant_attention(static, pi)
    again = layer.to_static(pi)
    x = torch.randn(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(again(x), layer(x), rtol=1e-9, atol=1e-9)
    expected = PLAIN.get(type(static), type(static)) if case != "fixed padding" else nn.Conv2d
    assert type(again) is expected
    assert not again.training
    assert getattr(again, WAS_DYNAMIC)


@pytest.mark.parametrize(("gate", "each"), [("softmax", 0.25), ("sigmoid", 0.5)])
def test_without_weights_all_kernels_count_alike(gate, each):
    layer = handler(nn.Conv2d(2, 3, 1)).from_static(nn.Conv2d(2, 3, 1), k=4, gate=gate)
    nn.init.normal_(layer.bank)
    expected = each * layer.bank.sum(0).view(3, 2, 1, 1)
    torch.testing.assert_close(layer.to_static().weight, expected)


def test_type_and_requires_grad_carry_over_and_a_wrong_number_of_weights_is_named():
    static = nn.Conv2d(2, 3, 1).bfloat16().requires_grad_(False)
    layer = handler(static).from_static(static, k=4)
    again = layer.to_static(torch.full((4,), 0.25))
    assert again.weight.dtype == again.bias.dtype == torch.bfloat16
    assert not again.weight.requires_grad
    torch.testing.assert_close(again.weight, static.weight)
    with pytest.raises(UsageError, match=r"4 kernels .* \(3,\)"):
        layer.to_static(torch.ones(3))


def test_drawing_nothing_random():
    layer = handler(nn.Conv2d(2, 3, 1)).from_static(nn.Conv2d(2, 3, 1), k=4)
    state = torch.get_rng_state()
    layer.to_static()
    assert torch.equal(torch.get_rng_state(), state)
