import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dysurgery.nn import DynamicConv2d, execution, native
from dysurgery.nn.attention import GATES, SoftmaxGate
from dysurgery.nn.execution import WAYS, Geometry, choose, choose_for_any_batch, covers, pool

pytestmark = pytest.mark.skipif(not native.available(), reason="the package was installed without a C compiler")
DENSE = Geometry((40, 20, 3, 3), (1, 1), (1, 1), (1, 1), 1)
WINOGRAD = Geometry((70, 40, 3, 3), (1, 1), (1, 1), (1, 1), 1)
DEPTHWISE = Geometry((24, 1, 3, 3), (2, 2), (1, 1), (1, 1), 24)


@pytest.fixture(params=native._native.names() if native.available() else [])
def instructions(request):
    """Each instruction set of this machine in turn."""
    native._native.use(request.param)
    yield request.param
    native._native.use(native._native.names()[0])


def nhwc(x):
    return x.contiguous(memory_format=torch.channels_last)


def tensors(geometry, batch, size, k, bias=True):
    torch.manual_seed(0)
    channels = geometry.weight_shape[1] * geometry.groups
    biases = torch.randn(k, geometry.out_channels) if bias else None
    x = nhwc(torch.randn(batch, channels, *size))
    return x, torch.randn(batch, k), torch.randn(k, math.prod(geometry.weight_shape)), biases


def run(way, given, geometry, dtype):
    """Return the output and the gradients, of which the seed is the same for all ways."""
    inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in given]
    y = WAYS[way](*inputs, geometry)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], direction)]


def assert_equal(found, expected):
    y, _, gpi, *_ = expected
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        # The gradient of pi adds up y times a normal direction: terms of the norm of y, however much of them cancels.
        size = max(b.abs().max().item(), y.norm().item() if b is gpi else 1e-3)
        assert (a.double() - b).abs().max() <= 1e-4 * size


@st.composite
def cases(draw):
    """A dense or depthwise geometry, a batch, a size and K: odd ones too."""

    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel, stride, dilation, padding = pair(1, 5), pair(1, 3), pair(1, 2), pair(0, 3)
    smallest = [max(1, d * (s - 1) + 1 - 2 * p) for s, d, p in zip(kernel, dilation, padding, strict=True)]
    size = tuple(draw(st.integers(low, low + 9)) for low in smallest)
    if draw(st.booleans()):
        channels = draw(st.integers(16, 40))
        geometry = Geometry((channels, 1, *kernel), stride, padding, dilation, channels)
    else:
        geometry = Geometry((draw(st.integers(1, 70)), draw(st.integers(2, 70)), *kernel), stride, padding, dilation, 1)
    return geometry, draw(st.integers(1, 11)), size, draw(st.integers(1, 6)), draw(st.booleans())


@st.composite
def winograd_cases(draw):
    """A 3x3 geometry of stride 1 on maps that are large enough, with any padding and odd sizes too."""
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    height, width = draw(st.integers(6, 20)), draw(st.integers(6, 40))
    channels, outputs = draw(st.integers(32, 90)), draw(st.integers(32, 140))
    geometry = Geometry((outputs, channels, 3, 3), (1, 1), padding, (1, 1), 1)
    return geometry, draw(st.integers(1, 11)), (height, width), draw(st.integers(1, 6)), draw(st.booleans())


@st.composite
def depthwise_cases(draw):
    """The depthwise geometries that networks have, on maps down to those that their kernels do not fit into."""
    k, stride, channels = draw(st.sampled_from([3, 5, 7])), draw(st.sampled_from([1, 2])), draw(st.integers(16, 40))
    padding = draw(st.tuples(st.integers(k // 2, k // 2 + 1), st.integers(0, k)))
    size = draw(st.integers(1, 19)), draw(st.integers(max(1, k - 2 * padding[1]), 30))
    geometry = Geometry((channels, 1, k, k), (stride, stride), padding, (1, 1), channels)
    return geometry, draw(st.integers(1, 4)), size, draw(st.integers(1, 5)), draw(st.booleans())


@given(case=cases() | winograd_cases() | depthwise_cases())
@settings(max_examples=120, deadline=None)
def test_it_equals_the_grouped_convolution_in_float64_for_every_geometry_and_instruction_set(case):
    geometry, *rest = case
    given = tensors(geometry, *rest)
    expected = run("grouped", given, geometry, torch.float64)
    for name in native._native.names():
        native._native.use(name)
        try:
            assert_equal(run("native", given, geometry, torch.float32), expected)
        finally:
            native._native.use(native._native.names()[0])


@pytest.mark.parametrize(
    ("geometry", "batch", "size"),
    [
        (DENSE, 9, (30, 41)),  # more patches than are kept at a time
        (Geometry((24, 32, 1, 1), (1, 1), (0, 0), (1, 1), 1), 2, (95, 101)),  # as many positions, which are patches
        (Geometry((20, 600, 1, 1), (2, 2), (0, 0), (1, 1), 1), 3, (9, 8)),  # several blocks of channels
        (Geometry((300, 70, 3, 3), (2, 1), (1, 1), (1, 1), 1), 9, (40, 11)),  # several blocks of outputs in bands
        (Geometry((12, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1), 2, (61, 64)),  # more taps than a vector has floats
        (Geometry((40, 3, 27, 23), (1, 1), (13, 11), (1, 1), 1), 9, (30, 31)),  # more taps than a panel has rows
        (Geometry((300, 150, 3, 3), (1, 1), (1, 1), (1, 1), 1), 9, (11, 15)),  # Winograd, several blocks of both
        (Geometry((40, 33, 3, 3), (1, 1), (2, 0), (1, 1), 1), 2, (30, 31)),  # Winograd, unlike paddings
    ],
    ids=["bands", "bare", "channels", "outputs", "taps", "huge", "winograd", "border"],
)
def test_large_maps_and_wide_layers_equal_the_grouped_convolution_in_float64(instructions, geometry, batch, size):
    given = tensors(geometry, batch, size, 3)
    assert_equal(run("native", given, geometry, torch.float32), run("grouped", given, geometry, torch.float64))


@pytest.mark.parametrize("size", [(7, 7), (30, 41)])
@pytest.mark.parametrize("geometry", [DENSE, WINOGRAD, DEPTHWISE], ids=["dense", "winograd", "depthwise"])
def test_two_threads_compute_what_one_does(instructions, geometry, size):
    given, threads = tensors(geometry, 9, size, 4), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(run("native", given, geometry, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("geometry", [DENSE, DEPTHWISE], ids=["dense", "depthwise"])
def test_inputs_that_lie_otherwise_in_memory_give_the_same(geometry):
    x, pi, bank, biases = tensors(geometry, 3, (9, 8), 4)
    expected = run("native", (x, pi, bank, biases), geometry, torch.float32)[0]
    wider = torch.zeros(6, 9, 10, x.shape[1])
    wider[::2, :, 1:9] = x.movedim(1, -1)
    sliced = wider.movedim(-1, 1)[::2, :, :, 1:9]
    assert sliced.stride(1) == 1
    with torch.no_grad():
        for other in (sliced, x.contiguous()):
            y = WAYS["native"](other, pi.T.contiguous().T, bank, biases, geometry)
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
            assert y.is_contiguous(memory_format=torch.channels_last) == (other is sliced)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("geometry", [DENSE, DEPTHWISE], ids=["dense", "depthwise"])
def test_only_the_gradients_that_are_wanted_are_there(geometry, wanted):
    given = tensors(geometry, 3, (7, 6), 4)
    expected = run("native", given, geometry, torch.float32)
    inputs = [t.clone().requires_grad_(want) for t, want in zip(given, (*wanted, False), strict=True)]
    y = WAYS["native"](*inputs, geometry)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(direction)
    for t, want, gradient in zip(inputs, wanted, expected[1:4], strict=False):
        assert (t.grad is not None) == want
        if want:
            torch.testing.assert_close(t.grad, gradient, rtol=1e-5, atol=1e-4)


def test_it_is_one_node_of_a_compiled_graph():
    given = tensors(DENSE, 3, (7, 6), 4)
    compiled = torch.compile(WAYS["native"], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given, DENSE), WAYS["native"](*given, DENSE))


def test_it_is_taken_for_float32_in_channels_last_alone():
    x = nhwc(torch.empty(8, 20, 14, 14))
    assert choose(x, DENSE) == choose(x, DENSE, train=True) == "native"
    assert not covers("native", x.contiguous(), DENSE)
    assert not covers("native", x.double(), DENSE)
    assert not covers("native", x, DENSE._replace(groups=2, weight_shape=(40, 10, 3, 3)))
    assert not covers("native", x[:0], DENSE)
    with torch.autocast("cpu"):
        assert not covers("native", x, DENSE)
    with pytest.raises(TypeError, match=r"float32 on a CPU, not torch\.float64"):
        WAYS["native"](x.double(), torch.ones(8, 1).double(), torch.ones(1, 7200).double(), None, DENSE)


@pytest.mark.parametrize("batch", [1, 2])
def test_who_counts_operations_sees_them(batch):
    layer, x = DynamicConv2d(24, 24, 3), nhwc(torch.randn(batch, 24, 8, 8))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() >= 2 * batch * 24 * 24 * 9 * 36


def test_without_the_compiled_module_other_ways_are_taken(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    x = nhwc(torch.empty(8, 20, 14, 14))
    assert not covers("native", x, DENSE)
    assert choose(x, DENSE) != "native"


def test_it_keeps_no_mixed_kernels_for_the_backward_pass():
    given, kept = [t.requires_grad_() for t in tensors(DENSE, 3, (7, 6), 4)], []

    def keep(tensor):
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = WAYS["native"](*given, DENSE)
    assert set(kept) <= {t.untyped_storage().data_ptr() for t in given}
    nn.functional.relu_(y).sum().backward()  # an activation in place may follow


def test_nan_and_infinity_stay_in_their_sample():
    x, pi, bank, biases = tensors(DENSE, 4, (7, 6), 4)
    clean = WAYS["native"](x, pi, bank, biases, DENSE)
    x = x.clone(memory_format=torch.preserve_format)
    x[1, 3, 2, 2], x[2, 0, 0, 0] = math.nan, math.inf
    y = WAYS["native"](x, pi, bank, biases, DENSE)
    assert y[1].isnan().any()
    assert not y[2].isfinite().all()
    torch.testing.assert_close(y[[0, 3]], clean[[0, 3]], rtol=0, atol=0)


@given(
    batch=st.integers(1, 9), channels=st.integers(1, 150), size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    k=st.integers(1, 6), kind=st.sampled_from(sorted(GATES)), tau=st.sampled_from([0.5, 1.0, 30.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_pooling_and_gate_equal_those_of_torch_in_float64(batch, channels, size, k, kind, tau):
    torch.manual_seed(0)
    gate, x = GATES[kind](channels, k), nhwc(torch.randn(batch, channels, *size))
    gate.tau.fill_(tau)
    expected = copy.deepcopy(gate).double()(x.double().mean((2, 3)))
    for name in native._native.names():
        native._native.use(name)
        try:
            with torch.no_grad():
                found = gate(pool(x))
        finally:
            native._native.use(native._native.names()[0])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_a_gate_that_somebody_listens_to_calls_its_layers(part):
    gate, heard = GATES["softmax"](24, 4), []
    gate.get_submodule(part).register_forward_hook(lambda *_: heard.append(part))
    with torch.no_grad():
        gate(torch.randn(2, 24))
    assert heard == [part]


def test_a_gate_is_differentiable_and_stays_so_in_other_types():
    gate, x = GATES["softmax"](24, 4), torch.randn(2, 24, requires_grad=True)
    gate(x)[:, 0].sum().backward()
    assert x.grad is not None
    assert gate.fc1.weight.grad is not None
    with torch.no_grad():
        assert gate.double()(x.double()).dtype == torch.float64
        with torch.autocast("cpu"):
            assert gate.float()(x).dtype == torch.float32


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("arguments", [(20, 40, 3, 2, 1), (24, 24, 3, 1, 1, 1, 24), (16, 32, 1)], ids=str)
def test_a_layer_in_one_call_equals_the_layer_in_parts_in_float64(arguments, batch, bias, kind):
    torch.manual_seed(0)
    layer, x = DynamicConv2d(*arguments, bias=bias, gate=kind), nhwc(torch.randn(batch, arguments[0], 9, 12))
    layer.gate.tau.fill_(3)
    layer.chooser = lambda *_: "native"
    wide = copy.deepcopy(layer).double()
    wide.chooser = lambda *_: "grouped"
    calls = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "layer_in_c", lambda *a, **b: calls.append(1) or native.layer(*a, **b))
        found = layer(x)
    assert calls
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), wide(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [
    lambda own: 2 * own, lambda own: own.t().contiguous().t(), lambda own: own[..., :1].expand_as(own),
    lambda own: own.double(), lambda own: own[..., :-1].clone(),
], ids=["value", "layout", "expanded", "type", "size"])  # fmt: skip
@pytest.mark.parametrize("name", ["bank", "bias_bank", "gate.fc1.weight", "gate.fc1.bias", "gate.fc2.weight"])
def test_parameters_that_are_no_longer_what_they_were_are_noticed_at_the_next_call(name, change, monkeypatch):
    def outcome():
        try:
            return layer(x)
        except RuntimeError as error:
            return type(error)

    torch.manual_seed(0)
    layer, x = DynamicConv2d(16, 16, 1, reduction=1), nhwc(torch.randn(2, 16, 5, 5))
    nn.init.normal_(layer.gate.fc2.weight)
    with torch.no_grad():
        layer(x)
        path, _, own = name.rpartition(".")
        setattr(layer.get_submodule(path), own, nn.Parameter(change(layer.get_parameter(name))))
        found = outcome()
        monkeypatch.setattr(native, "_native", None)
        expected = outcome()
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:
            assert found is expected


@pytest.mark.parametrize("part", ["gate", "gate.fc1"])
def test_a_layer_whose_gate_somebody_listens_to_calls_it(part):
    layer, heard = DynamicConv2d(24, 24, 3), []
    with torch.no_grad():
        expected = layer(nhwc(torch.randn(1, 24, 8, 8, generator=torch.Generator().manual_seed(0))))
        layer.get_submodule(part).register_forward_hook(lambda *_: heard.append(part))
        found = layer(nhwc(torch.randn(1, 24, 8, 8, generator=torch.Generator().manual_seed(0))))
    assert heard == [part]
    torch.testing.assert_close(found, expected)


def test_a_layer_with_a_gate_of_ones_own_asks_it():
    class First(SoftmaxGate):
        @staticmethod
        def weights(z, tau):
            return torch.eye(z.shape[1])[:1].expand(z.shape)

    layer, x = DynamicConv2d(24, 24, 3), nhwc(torch.randn(1, 24, 8, 8))
    layer.gate = First(24, 4)
    with torch.no_grad():
        y = layer(x)
        expected = nn.functional.conv2d(x, layer.bank[0].view(layer.weight_shape), layer.bias_bank[0])
    torch.testing.assert_close(y, expected)


def test_a_changed_geometry_or_chooser_is_seen_by_the_next_call():
    layer, x = DynamicConv2d(24, 24, 3), nhwc(torch.randn(1, 24, 8, 8))
    with torch.no_grad():
        y = layer(x)
        layer.stride = (2, 2)
        assert layer(x).shape == (1, 24, 3, 3)
        layer.stride, layer.chooser = (1, 1), choose_for_any_batch
        torch.testing.assert_close(layer(x), y)


def test_nan_in_the_descriptor_is_seen_in_pi():
    gate, x = GATES["softmax"](24, 4), torch.randn(2, 24)
    x[1, 3] = math.nan
    with torch.no_grad():
        pi = gate(x)
    assert pi[1].isnan().all()
    assert pi[0].isfinite().all()


def test_another_instruction_set_must_be_one_of_the_machine():
    with pytest.raises(ValueError, match="no instruction set of this machine: mmx"):
        native._native.use("mmx")
