import copy

import pytest
import torch
from torch import nn

from dysurgery.nn import DynamicConv2d, native
from dysurgery.nn.attention import GATES

pytestmark = pytest.mark.skipif(not native.available(), reason="the package was installed without a C compiler")

KINDS = {
    "1x1": {"kernel_size": 1},
    "strided 1x1": {"kernel_size": 1, "stride": 2},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "winograd": {"kernel_size": 3, "padding": 1},
    "dilated": {"kernel_size": (3, 2), "padding": (2, 0), "dilation": 2},
    "3x3 depthwise": {"kernel_size": 3, "padding": 1, "groups": 40},
    "5x5 depthwise": {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 40},
}


def layer(kind="winograd", gate="softmax", bias=True):
    torch.manual_seed(0)
    made = DynamicConv2d(40, 40, bias=bias, gate=gate, k=3, **KINDS[kind])
    nn.init.normal_(made.gate.fc2.weight)
    made.gate.tau.fill_(1.5)
    made.chooser = lambda *args: "native"
    return made


def images(batch=5, size=(13, 12)):
    x = torch.randn(batch, 40, *size).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def run(made, x):
    """Return the output and all gradients."""
    y = made(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, torch.autograd.grad(y, [x, *made.parameters()], direction)


def widened(made):
    """A copy in float64, which goes its own way."""
    wide = copy.deepcopy(made).double()
    del wide.chooser
    return wide


def taken(y):
    return type(y.grad_fn).__name__ == "_WholeBackward"


@pytest.mark.parametrize("instructions", native._native.names() if native.available() else [])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_those_of_the_parts_in_float64(kind, bias, gate, instructions):
    made, x = layer(kind, gate, bias), images()
    native._native.use(instructions)
    try:
        y, gradients = run(made, x)
    finally:
        native._native.use(native._native.names()[0])
    assert taken(y)
    expected, wide = run(widened(made), x.detach().double().requires_grad_())
    for a, b in zip((y, *gradients), (expected, *wide), strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("kind", ["winograd", "3x3 depthwise"])
def test_two_threads_compute_what_one_does(kind):
    made, x, threads = layer(kind), images(9, (30, 31)), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y, gradients = run(made, x)
            found.append((y, *gradients))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("trained", ["x", "bank", "bias_bank", "gate.fc1.weight", "gate.fc2.bias"])
def test_only_what_is_trained_has_a_gradient(trained):
    made, x = layer(), images()
    _, gradients = run(made, x)
    names = ["x", *dict(made.named_parameters())]
    expected = dict(zip(names, gradients, strict=True))[trained]
    made.requires_grad_(False)
    x.requires_grad_(trained == "x")
    if trained != "x":
        made.get_parameter(trained).requires_grad_()
    y = made(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    found = x.grad if trained == "x" else made.get_parameter(trained).grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for name, p in made.named_parameters() if name != trained)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_of_gradients_equal_those_of_the_parts_in_float64(gate):
    made, x = layer("winograd", gate), images(3)
    wide, wide_x = widened(made), x.detach().double().requires_grad_()
    found = []
    for module, given in ((made, x), (wide, wide_x)):
        y = module(given)
        first = torch.autograd.grad(y.square().sum(), [given, *module.parameters()], create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(total, [given, *module.parameters()]))
    for a, b in zip(*found, strict=True):
        assert (a.double() - b).abs().max() <= 1e-4 * b.abs().max()


def test_it_keeps_its_input_and_no_map_beside():
    made, x, kept = layer("1x1"), images(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x)
    own = {p.data_ptr() for p in (x, *made.parameters(), *made.buffers())}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) == x.shape[0] * (40 + made.k)


@pytest.mark.parametrize("how", ["hook", "tau", "autocast", "double", "nchw", "own"])
def test_elsewhere_the_parts_run(how):
    made, x = layer("3x3 depthwise"), images()
    if how == "hook":
        made.gate.register_forward_hook(lambda module, args, pi: None)
    if how == "tau":
        made.gate.tau.requires_grad_()
    if how == "double":
        made, x = made.double(), x.double()
    if how == "nchw":
        x = x.contiguous()
    if how in ("double", "nchw", "autocast"):
        del made.chooser
    if how == "own":
        made.gate.__class__ = type("Own", (type(made.gate),), {})
    with torch.autocast("cpu", enabled=how == "autocast"):
        y = made(x)
    assert not taken(y)
    y.sum().backward()
    assert all(p.grad is not None for p in made.parameters())
