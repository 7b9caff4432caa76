import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn
from torch.nn import functional as F

from dysurgery import set_temperature
from dysurgery.nn import DynamicConv2d, DynamicConv2dSame, DynamicConvTranspose2d, DynamicLinear, handler

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")  # torch, of even kernels

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
EXACT_STARTS = (("softmax", "copies"), ("softmax", "zero-sum"), ("sigmoid", "zero-sum"))


def looped(layer, x):
    """The definition: for every sample, mix the kernels by hand and run one plain convolution."""
    pi = layer.gate(x.mean(dim=(2, 3)))
    bank = layer.bank.view(layer.k, *layer.weight_shape)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        static = nn.Conv2d(
            1, 1, layer.kernel_size, padding=padding, dilation=layer.dilation, padding_mode=layer.padding_mode
        )
        x = F.pad(x, static._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    rows = []
    for b in range(x.shape[0]):
        weight = sum(pi[b, k] * bank[k] for k in range(layer.k))
        bias = None if layer.bias_bank is None else sum(pi[b, k] * layer.bias_bank[k] for k in range(layer.k))
        rows.append(F.conv2d(x[b : b + 1], weight, bias, layer.stride, padding, layer.dilation, layer.groups))
    return torch.cat(rows)


@st.composite
def convolutions(draw, batches=(1, 2, 3)):
    """Keyword arguments of a convolution of any geometry, and the shape of an input for it."""
    groups = draw(st.integers(1, 4))
    channels = groups * draw(st.integers(1, 3))
    if draw(st.booleans()):
        groups = channels  # depthwise
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = draw(
        st.one_of(st.just("valid"), st.just("same"), st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)))
    )
    if padding == "same":
        stride = (1, 1)
    options = {
        "in_channels": channels,
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(PADDING_MODES)),
    }
    # 7 is the reach of a kernel of 4 at dilation 2; reflection needs more pixels than it pads.
    size = (draw(st.integers(7, 11)), draw(st.integers(7, 11)))
    return options, (draw(st.sampled_from(batches)), channels, *size)


def as_is(x):
    return x


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def every_other(x):
    """The same values with gaps between them, rows and columns exchanged in memory."""
    return x.mT.repeat_interleave(2, dim=-1)[..., ::2].mT


layouts = st.sampled_from([as_is, channels_last, every_other])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(convolutions(), layouts, st.sampled_from(["softmax", "sigmoid"]))
def test_every_geometry_equals_a_loop_over_the_samples_in_values_and_gradients(case, layout, gate):
    options, shape = case
    torch.manual_seed(0)
    layer = DynamicConv2d(**options, k=3, gate=gate, dtype=torch.float64)
    x = layout(torch.randn(shape, dtype=torch.float64)).requires_grad_()
    wanted = [x, *layer.parameters()]
    y, reference = layer(x), looped(layer, x)
    assert y.shape == reference.shape
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(y)
    found = torch.autograd.grad(y, wanted, direction)
    expected = torch.autograd.grad(reference, wanted, direction)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    convolutions(batches=(0, 1, 2, 3)),
    layouts,
    st.sampled_from(EXACT_STARTS),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.3, 1.0, 30.0]),
)
def test_a_conversion_computes_what_the_convolution_did_at_any_temperature(case, layout, how, k, tau):
    options, shape = case
    torch.manual_seed(0)
    static = nn.Conv2d(**options, dtype=torch.float64)
    layer = DynamicConv2d.from_static(static, k=k, gate=how[0], start=how[1])
    set_temperature(layer, tau)
    x = layout(torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(layer(x), static(x), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    layer = DynamicConv2d(2, 3, 2, k=2, dtype=torch.float64)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x), (x, *values)
    )


@pytest.mark.parametrize("tau", [1.0, 30.0, 0.3])
def test_copies_preserve_the_function_at_any_temperature_and_attention(tau):
    static = nn.Conv2d(6, 8, 3).double()
    layer = DynamicConv2d.from_static(static, k=4)
    nn.init.normal_(layer.gate.fc2.weight, std=100.0)
    set_temperature(layer, tau)
    x = torch.randn(3, 6, 7, 7, dtype=torch.float64)
    assert layer.gate(x.mean((2, 3))).std(dim=0).max() > 0.01
    torch.testing.assert_close(layer(x), static(x), rtol=1e-12, atol=1e-12)


@st.composite
def other_convolutions(draw):
    """A convolution over one or three axes, or a transposed one, and the shape of an input for it."""
    axes, transposed = draw(st.sampled_from([(1, False), (3, False), (1, True), (2, True), (3, True)]))
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 2))
    each = {name: tuple(draw(st.integers(*ends)) for _ in range(axes)) for name, ends in OPTIONS.items()}
    options = {"groups": groups, "bias": draw(st.booleans()), **each}
    if transposed:
        # torch wants it below the stride or the dilation.
        options["output_padding"] = tuple(draw(st.integers(0, stride - 1)) for stride in each["stride"])
    else:
        options["padding_mode"] = draw(st.sampled_from(PADDING_MODES))
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{axes}d")
    size = [draw(st.integers(5, 7)) for _ in range(axes)]
    out_channels = groups * draw(st.integers(1, 2))
    return kind(channels, out_channels, **options), (draw(st.integers(0, 3)), channels, *size)


OPTIONS = {"kernel_size": (1, 3), "stride": (1, 3), "padding": (0, 2), "dilation": (1, 2)}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(other_convolutions(), st.sampled_from(EXACT_STARTS), st.booleans())
def test_convolutions_of_other_axes_and_transposed_ones_are_kept_too(case, how, last):
    static, shape = case
    static = static.double()
    layer = handler(static).from_static(static, k=3, gate=how[0], start=how[1])
    x = torch.randn(shape, dtype=torch.float64)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    try:
        expected = static(x)
    except RuntimeError:  # a kernel larger than its input: the layer must not say otherwise
        with pytest.raises(RuntimeError):
            layer(x)
        return
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    if len(x):
        torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-12, atol=1e-12)
    assert type(layer).like(static, **layer.options()).state_dict().keys() == layer.state_dict().keys()


def test_a_transposed_convolution_takes_an_output_size():
    static = nn.ConvTranspose2d(4, 3, 3, stride=3, padding=1).double()
    layer = DynamicConvTranspose2d.from_static(static, k=2)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for size in ([14, 15], [2, 3, 13, 14]):
        torch.testing.assert_close(layer(x, size), static(x, size), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0], output_size=[14, 14]), static(x[0], output_size=[14, 14]))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)],
)
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("gate", "start"), EXACT_STARTS)
def test_types_and_devices(dtype, tolerance, device, kernel, gate, start):
    static = nn.Conv2d(8, 8, kernel, groups=1 if kernel == 1 else 4).to(device, dtype)
    layer = DynamicConv2d.from_static(static, k=4, gate=gate, start=start)
    assert {(t.dtype, t.device) for t in layer.state_dict().values()} == {(dtype, static.weight.device)}
    x = torch.randn(3, 8, 9, 9, device=device, dtype=dtype)
    y = layer(x)
    assert (y.dtype, y.device) == (dtype, x.device)
    torch.testing.assert_close(y, static(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_autocast_computes_in_bfloat16_and_trains_in_float32(kernel, batch):
    static = nn.Conv2d(8, 8, kernel)
    layer = DynamicConv2d.from_static(static, k=4)
    x = torch.randn(batch, 8, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), static(x), rtol=5e-2, atol=5e-2)
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_an_empty_batch_gives_an_empty_batch(kernel, bias):
    layer = DynamicConv2d(4, 6, kernel, stride=2, bias=bias)
    y = layer(torch.zeros(0, 4, 9, 9))
    assert y.shape == nn.Conv2d(4, 6, kernel, stride=2)(torch.zeros(0, 4, 9, 9)).shape
    y.sum().backward()


def test_one_image_without_a_batch_dimension():
    layer = DynamicConv2d(4, 6, 3, padding=1, padding_mode="reflect")
    x = torch.randn(4, 9, 9)
    torch.testing.assert_close(layer(x), layer(x.unsqueeze(0))[0])


def test_what_belongs_to_the_convolution_carries_over():
    static = nn.Conv2d(4, 6, 3, dtype=torch.float64).eval()
    static.weight.requires_grad_(False)
    layer = DynamicConv2d.from_static(static, k=4)
    assert not layer.training
    assert not layer.bank.requires_grad
    assert layer.bias_bank.requires_grad
    assert not any(p.requires_grad for p in layer.gate.parameters())
    assert DynamicConv2d.like(nn.Conv2d(4, 6, 3, device="meta"), k=4).bank.is_meta


@pytest.mark.parametrize(
    ("layer", "static"),
    [(DynamicConv2d, nn.Conv2d(8, 4, 3)), (DynamicConv2dSame, Conv2dSame(8, 4, 3)), (DynamicLinear, nn.Linear(8, 4))],
)
def test_its_options_build_the_layer_again(layer, static):
    first = layer.from_static(static, k=3, reduction=1, gate="sigmoid")
    again = layer.like(static, **first.options())
    again.load_state_dict(first.state_dict())
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(again(x), first(x), rtol=0, atol=0)


def test_channels_last_copying_and_state_keep_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), DynamicConv2d(4, 6, 3, k=4), DynamicConv2d(6, 6, 1, k=4))
    set_temperature(model, 4.5)
    x = torch.randn(2, 3, 9, 9)
    y = model(x)
    twin = copy.deepcopy(model)
    twin.to(memory_format=torch.channels_last)
    torch.testing.assert_close(twin(channels_last(x)), y)
    nn.init.zeros_(twin[1].bank)
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), DynamicConv2d(4, 6, 3, k=4), DynamicConv2d(6, 6, 1, k=4))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), y, rtol=0, atol=0)
    assert fresh[1].gate.tau == 4.5


@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_without_a_graph_break_and_not_again_when_tau_changes(batch):
    torch._dynamo.reset()
    model = nn.Sequential(
        DynamicConv2dSame(3, 4, 3, stride=2), nn.ReLU(), DynamicConv2d(4, 6, 1), nn.Flatten(2), DynamicLinear(25, 5)
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(batch, 3, 9, 9)
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tau in (30.0, 7.0, 1.0):
            set_temperature(model, tau)
            torch.testing.assert_close(compiled(x), model(x))


def test_compiled_once_more_for_one_image_and_once_for_all_other_batches():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    wide = DynamicConv2d(128, 128, 3, padding=1)  # in tiles on a CPU
    model = nn.Sequential(DynamicConv2d(8, 128, 1), wide, DynamicConv2d(128, 128, 3, groups=128)).eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for batch in (8, 1, 4, 3, 16, 2, 40):
            x = torch.randn(batch, 8, 6, 6)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 3
    assert any("dysurgery" in str(node.target) for node in graphs[-1].graph.nodes)


def test_under_copies_the_attention_wakes_up_after_one_step_and_under_zero_sum_at_once():
    x = torch.randn(4, 6, 7, 7, dtype=torch.float64)

    def gradient(layer):
        layer.zero_grad()
        layer(x).square().mean().backward()
        return layer.gate.fc2.weight.grad.abs().max().item()

    torch.manual_seed(0)
    static = nn.Conv2d(6, 8, 3).double()
    layer = DynamicConv2d.from_static(static, k=4)
    assert gradient(layer) < 1e-15
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    assert gradient(layer) > 1e-8
    assert gradient(DynamicConv2d.from_static(static, k=4, start="zero-sum")) > 1e-6


@pytest.mark.parametrize("k", [2, 4])
def test_under_sgd_the_mixed_kernel_moves_k_times_slower_than_the_static_one(k):
    static = nn.Conv2d(6, 8, 3).double()
    layer = DynamicConv2d.from_static(static, k=k)
    layer.gate.silence()  # pi = 1/K
    x = torch.randn(4, 6, 7, 7, dtype=torch.float64)
    before = static.weight.detach().clone()
    for module in (static, layer):
        module(x).square().mean().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    step, mixed_step = static.weight - before, layer.bank.mean(0).view_as(before) - before
    torch.testing.assert_close(mixed_step, step / k)


def test_the_geometry_of_nn_conv2d_is_checked_as_there():
    with pytest.raises(ValueError, match="divisible by groups"):
        DynamicConv2d(5, 6, 3, groups=2)
