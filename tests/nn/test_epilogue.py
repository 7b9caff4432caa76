import copy
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from dysurgery import freeze
from dysurgery.nn import DynamicConv2d, FusedActivation, native
from dysurgery.nn.epilogue import ACTIVATIONS
from dysurgery.nn.links import Link, connect, links_of

pytestmark = pytest.mark.skipif(not native.available(), reason="the package was installed without a C compiler")

KINDS = {
    "1x1": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "winograd": {"kernel_size": 3, "padding": 1},
    "3x3 depthwise": {"kernel_size": 3, "padding": 1, "groups": 40},
    "5x5 depthwise": {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 40},
}


def network(act, **geometry):
    """Two dynamic convolutions with an activation between."""
    torch.manual_seed(0)
    layers = DynamicConv2d(40, 40, **geometry), act, DynamicConv2d(40, 24, 1)
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.gate.fc2.weight)
    return nn.Sequential(*layers).eval()


def connected(net):
    net = copy.deepcopy(net)
    connect(net, [Link("0", "1", "2")])
    return net


def images(size=(19, 23), batch=9):
    return torch.randn(batch, 40, *size).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def calls(monkeypatch):
    """What each layer in one call of C was asked for."""
    seen, layer = [], native._native.layer

    class Watched:
        def __getattr__(self, name):
            return getattr(_native, name)

        def layer(self, *args):
            seen.append({"knows": args[2] != 0, "activation": args[7], "averages": args[8] != 0})
            return layer(*args)

    _native = native._native
    monkeypatch.setattr(native, "_native", Watched())
    return seen


@pytest.mark.parametrize("instructions", native._native.names() if native.available() else [])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_what_is_in_the_call_equals_what_torch_computes_in_float64(act, kind, instructions, calls):
    net, x = network(act(), **KINDS[kind]), 3 * images()
    native._native.use(instructions)
    try:
        with torch.no_grad():
            found, expected = connected(net)(x), copy.deepcopy(net).double()(x.double())
    finally:
        native._native.use(native._native.names()[0])
    assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [call["activation"] for call in calls] == [ACTIVATIONS[act], 0]
    assert [call["averages"] for call in calls] == [True, False]
    assert [call["knows"] for call in calls] == [False, True]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_do_not_stay_in_the_cache_together_are_pooled_a_few_at_a_time(kind, threads):
    net, x, before = network(nn.ReLU(), **KINDS[kind]), images((45, 90), batch=5), torch.get_num_threads()
    x = x * torch.arange(1, 6).view(5, 1, 1, 1)  # unlike means
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            found = connected(net)(x)
    finally:
        torch.set_num_threads(before)
    expected = copy.deepcopy(net).double()(x.double())
    assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_several_threads_compute_what_one_does(kind, batch):
    net, x, threads = network(nn.ReLU(), **KINDS[kind]), images(batch=batch), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                found.append(connected(net)(x))
    finally:
        torch.set_num_threads(threads)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-6, -3.0, 3.0, 6.5, -50.0, -88.0, 88.0, -200.0, 1e30, -1e30])
def test_any_value_is_activated_as_torch_does(act, value):
    layer = DynamicConv2d(16, 16, 1, k=1).eval()
    net = nn.Sequential(layer, act())
    connect(net, [Link("0", "1", None)])
    with torch.no_grad():
        layer.bank.copy_(torch.eye(16).flatten()[None])
        layer.bias_bank.zero_()
        layer.gate.silence()
        x = torch.full((1, 16, 2, 2), value).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(net(x), act()(x), rtol=2e-6, atol=1e-30)


def test_elsewhere_each_does_its_own(calls):
    net, x = network(nn.ReLU(), **KINDS["1x1"]), images()
    told = connected(net)
    with torch.no_grad():
        contiguous = x.contiguous()
        torch.testing.assert_close(told(contiguous), net(contiguous))
        hook = told[0].register_forward_hook(lambda module, args, y: seen.append(y.clone()))
        seen = []
        torch.testing.assert_close(told(x), net(x))
        torch.testing.assert_close(seen[0], net[0](x))  # a hook sees the output as it is
        hook.remove()
    torch.testing.assert_close(told.double()(x.double()), net.double()(x.double()))
    trained = network(nn.SiLU(), **KINDS["winograd"]).train()
    expected = torch.autograd.grad(trained(x).square().sum(), list(trained.parameters()))
    told = connected(trained)
    for a, b in zip(torch.autograd.grad(told(x).square().sum(), list(told.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not any(call["activation"] for call in calls)


def test_a_layer_that_is_static_again_is_activated_where_it_was():
    net, x = network(nn.Hardswish(), **KINDS["winograd"]), images()
    told = freeze(connected(net))
    assert type(told[0]) is nn.Conv2d
    with torch.no_grad():
        torch.testing.assert_close(told(x), freeze(net)(x), rtol=1e-5, atol=1e-5)


def test_only_the_tensor_that_was_activated_is_passed_on():
    told, x = connected(network(nn.Hardswish(), **KINDS["1x1"])), images()
    with torch.no_grad():
        y = told[0](x)
        assert told[1](y) is y
        assert torch.equal(told[1](y.clone()), nn.functional.hardswish(y))
        told[2](y.clone())  # which has its own mean
        expected = told[2](y.clone())
        torch.testing.assert_close(told[2](y), expected, rtol=1e-5, atol=1e-6)


def test_threads_that_share_a_network_do_not_take_one_anothers_work():
    net = connected(network(nn.SiLU(), **KINDS["1x1"]))
    inputs = [images((size, size), batch=2) for size in (5, 5, 7, 9)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]

    def run(i):
        torch.set_num_threads(1)
        with torch.no_grad():
            return all(torch.equal(net(inputs[i]), expected[i]) for _ in range(300))

    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)  # so that they change places within a layer
    try:
        with ThreadPoolExecutor(len(inputs)) as pool:
            assert all(pool.map(run, range(len(inputs))))
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)


def test_hooks_that_change_a_tensor_in_place_are_heard():
    net, x = network(nn.ReLU(), **KINDS["1x1"]), images()
    behind, before = connected(net), connected(net)
    behind[1].register_forward_hook(lambda module, args, y: y.add_(1))
    before[2].register_forward_pre_hook(lambda module, args: (args[0].add_(1),))
    with torch.no_grad():
        expected = net[2](net[1](net[0](x)) + 1)
        for told in (behind, before):
            torch.testing.assert_close(told(x), expected, rtol=1e-5, atol=1e-5)


def test_an_output_that_nobody_took_can_be_saved_and_copied(tmp_path):
    told = connected(network(nn.ReLU(), **KINDS["1x1"]))
    with torch.no_grad():
        y = told[0](images())
        torch.save(y, tmp_path / "features.pt")
        again = torch.load(tmp_path / "features.pt", weights_only=True)
        for twin in (again, copy.deepcopy(y)):
            assert torch.equal(twin, y)
            torch.testing.assert_close(told[2](told[1](twin)), told[2](told[1](y.clone())), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["1x1", "winograd", "3x3 depthwise"])
def test_in_a_compiled_graph_it_is_one_node_for_any_batch(kind, calls):
    net = network(nn.Hardswish(), **KINDS[kind])
    told, graphs = connected(net), []

    def backend(graph, example):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(told, backend=backend, fullgraph=True, dynamic=True)
    for batch in (2, 3, 9):
        x = images(batch=batch)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    assert sum(target is torch.ops.dysurgery.layer for target in graphs[0]) == 2
    assert nn.functional.hardswish not in graphs[0]
    assert [call["knows"] for call in calls[:2]] == [False, True]


def test_a_compiled_network_trains_as_it_did():
    net, x = network(nn.Hardswish(), **KINDS["1x1"]).train(), images()
    torch._dynamo.reset()
    compiled = torch.compile(connected(net), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), list(compiled.parameters()))
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_parts_may_be_compiled(part):
    net, x = network(nn.Hardswish(), **KINDS["1x1"]), images()
    told = connected(net)
    torch._dynamo.reset()
    told[part].forward = torch.compile(told[part].forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(told(x), net(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(told(x.contiguous()), net(x), rtol=1e-5, atol=1e-5)


def test_the_node_is_a_proper_operator():
    layer, x = DynamicConv2d(20, 24, 3, padding=1, bias=False).eval(), images((9, 8))[:, :20]
    x = x.contiguous(memory_format=torch.channels_last)
    own, window = list(layer.gate.plain_parameters()), [3, 3, 1, 1, 1, 1, 1, 1, 1]
    with torch.no_grad():
        args = (x, own, layer.bank.detach(), None, False, 24, window, None, 1, True)
        torch.library.opcheck(torch.ops.dysurgery.layer.default, args, test_utils=("test_schema", "test_faketensor"))
        y, mean = torch.ops.dysurgery.layer(*args)
        torch.testing.assert_close(y, layer(x).relu(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mean, y.mean((2, 3)), rtol=1e-5, atol=1e-6)
        empty, _ = torch.ops.dysurgery.layer(x[:0], *args[1:])
        assert empty.shape == (0, 24, 9, 8)


def test_copies_and_pickles_stand_for_themselves():
    told, x = connected(network(nn.ReLU(), **KINDS["1x1"])), images()
    with torch.no_grad():
        expected = told(x)
        for twin in (copy.deepcopy(told), pickle.loads(pickle.dumps(told))):
            assert links_of(twin) == links_of(told) == (Link("0", "1", "2"),)
            assert twin[0].epilogue is twin[2].source is not told[0].epilogue
            assert torch.equal(twin(x), expected)


def test_it_keeps_no_output_alive():
    told = connected(network(nn.ReLU(), **KINDS["1x1"]))
    with torch.no_grad():
        y = weakref.ref(told[0](images()))
    assert y() is None


@pytest.mark.parametrize(
    ("link", "error"),
    [
        (Link("1", None, "2"), "1 is a ReLU, no dynamic convolution"),
        (Link("0", "2", None), "2 is a DynamicConv2d, no activation that is known"),
        (Link("0", None, "1"), "1 is a ReLU, no dynamic convolution"),
    ],
)
def test_what_cannot_be_connected_is_said(link, error):
    with pytest.raises(ValueError, match=error):
        connect(network(nn.ReLU(), **KINDS["1x1"]), [link])


def test_an_activation_belongs_to_one_layer():
    with pytest.raises(ValueError, match="1 is said to follow two convolutions"):
        connect(network(nn.ReLU(), **KINDS["1x1"]), [Link("0", "1", None), Link("2", "1", None)])


def test_connecting_twice_is_connecting_once():
    told = connected(network(nn.ReLU(), **KINDS["1x1"]))
    connect(told, links_of(told))
    assert type(told[1]) is FusedActivation
    assert type(told[1].act) is nn.ReLU
