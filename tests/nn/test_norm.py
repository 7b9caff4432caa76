import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, StdConv2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from dysurgery.nn import FusedNorm, handler
from dysurgery.nn.layer import BIAS_ADDED
from dysurgery.nn.norm import absorb, add_bias, layer_refusal, norm_refusal, scale_and_shift

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip


def used(norm):
    """A BatchNorm in which nothing is trivially zero or one."""
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if name in ("weight", "running_var") else nn.init.normal_(tensor)
    return norm.double().eval()


def scattered(static, k=3, **options):
    """A dynamic layer whose kernels and attention are all different."""
    layer = handler(static).from_static(static, k=k, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.eval()


@st.composite
def convolutions(draw):
    """A convolution over one to three axes, transposed or not, with groups, and an input for it."""
    axes, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.integers(1, 3))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    static = CONVS[axes, transposed](
        channels,
        out,
        draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 1)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    return static.double(), torch.randn(draw(st.integers(1, 3)), channels, *[5] * axes, dtype=torch.float64)


@settings(max_examples=80, deadline=None)
@given(convolutions(), st.booleans())
def test_a_norm_is_absorbed_exactly_by_any_convolution_static_or_dynamic(case, affine):
    static, x = case
    axes = x.dim() - 2
    for layer in (static, scattered(static)):
        norm = used(NORMS[axes](static.out_channels, affine=affine))
        expected = norm(layer(x))
        absorb(layer, *scale_and_shift(norm))
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [FrozenBatchNorm2d, FrozenBatchNormAct2d, BatchNormAct2d, nn.SyncBatchNorm])
def test_other_norms_of_torchvision_and_timm_keep_their_activation(make):
    norm = used(make(6))
    conv, x = nn.Conv2d(4, 6, 3).double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    layer = scattered(conv)
    expected = norm(layer(x))
    absorb(layer, *scale_and_shift(norm))
    torch.testing.assert_close(FusedNorm(norm)(layer(x)), expected, rtol=1e-9, atol=1e-9)


def test_a_learned_activation_keeps_its_place_and_its_key():
    norm = used(BatchNormAct2d(6, act_layer=nn.PReLU))
    fused = FusedNorm(norm)
    assert list(fused.state_dict()) == ["act.weight"]
    assert fused.act is norm.act
    assert not fused.training


def test_a_matrix_takes_a_norm_in_too():
    layer, norm = scattered(nn.Linear(5, 7).double()), used(nn.BatchNorm1d(7))
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = norm(layer(x))
    absorb(layer, *scale_and_shift(norm))
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dynamic", [True, False])
def test_parameters_are_new_and_keep_their_kind(dynamic):
    conv = nn.Conv2d(4, 6, 3, bias=False).bfloat16().to(memory_format=torch.channels_last).requires_grad_(False)
    layer = scattered(conv) if dynamic else conv
    old = dict(layer.named_parameters())
    before = {name: tensor.clone() for name, tensor in old.items()}
    absorb(layer, *scale_and_shift(used(nn.BatchNorm2d(6))))
    weight = "bank" if dynamic else "weight"
    new = layer.get_parameter(weight)
    assert new is not old[weight]
    assert all(torch.equal(old[name], before[name]) for name in old)
    assert (new.dtype, new.requires_grad, new.stride()) == (torch.bfloat16, False, old[weight].stride())
    assert layer.get_parameter("bias_bank" if dynamic else "bias").dtype == torch.bfloat16
    assert vars(layer)[BIAS_ADDED]


def test_a_bias_that_is_there_is_not_marked_as_added():
    for layer in (nn.Conv2d(2, 3, 1), scattered(nn.Conv2d(2, 3, 1)), nn.Linear(2, 3)):
        before = [p.clone() for p in layer.parameters()]
        add_bias(layer)
        assert BIAS_ADDED not in vars(layer)
        assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    matrix = nn.Linear(2, 3, bias=False)
    add_bias(matrix)
    assert matrix.bias.tolist() == [0, 0, 0]


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnConstructor(nn.BatchNorm2d):
    def __init__(self):
        super().__init__(6)


def hooked():
    norm = nn.BatchNorm2d(6)
    norm.register_forward_pre_hook(lambda module, args: None)
    return norm


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (OwnNorm(6), "OwnNorm may compute"),
        (nn.BatchNorm2d(6, track_running_stats=False), "no running statistics"),
        (hooked(), "hook"),
    ],
)
def test_norms_that_cannot_be_folded_say_why(norm, words):
    assert words in norm_refusal(norm)
    assert norm_refusal(OwnConstructor()) is None


def seen():
    conv = nn.Conv2d(2, 3, 1)
    conv.register_forward_hook(lambda module, args, output: None)
    return conv


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (StdConv2d(4, 6, 3), "standardises"),
        (scattered(StdConv2d(4, 6, 3)), "standardises"),
        (scattered(nn.Conv2d(4, 6, 3), gate="sigmoid"), "sigmoid gate, whose weights do not sum to 1"),
        (seen(), "hook"),
        (nn.GroupNorm(1, 4), "no handler"),
    ],
)
def test_layers_that_cannot_take_a_norm_in_say_why(layer, words):
    assert words in layer_refusal(layer)
    assert layer_refusal(Conv2dSame(2, 3, 3)) is None
