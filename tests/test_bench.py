import copy
import gc
import json
import sys
from statistics import median

import pytest
import torch
from torch import nn

import dysurgery
from dysurgery import bench as run_bench
from dysurgery.bench import Bench, LayerTime, choose_grouped
from dysurgery.bench_pictures import bars, tradeoff
from dysurgery.latency import in_turns
from dysurgery.nn import DynamicLayer, native
from dysurgery.nn.conv import DynamicConvNd
from dysurgery.nn.execution import Situation

SIZE = (3, 16, 16)
QUICK = {"batches": (1, 3), "seconds": 0.01}


class Net(nn.Module):
    """Layers that go different ways, BatchNorm, and a Linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.fc(self.pointwise(self.depthwise(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    return Net().eval()


@pytest.fixture(scope="module")
def dynamic(net):
    return dysurgery.convert(net, torch.randn(1, *SIZE), linear=True, k=2)


@pytest.fixture(scope="module")
def found(net, dynamic):
    return run_bench(dynamic, SIZE, static=net, train=True, same_layout=True, **QUICK)


def test_every_mode_batch_and_layout_has_a_row_and_the_best_is_the_best_of_them(found):
    assert isinstance(found, Bench)
    layouts = ("best", "nchw", "nhwc")
    expected = [(mode, batch, layout) for mode in ("infer", "train") for batch in (1, 3) for layout in layouts]
    assert [(row.mode, row.batch, row.layout) for row in found.rows] == expected
    for best, *same in zip(*[iter(found.rows)] * 3, strict=True):
        for form in ("static", "dynamic", "grouped"):
            assert getattr(best, form) == min((getattr(row, form) for row in same), key=lambda m: m.ms)
    for row in found.rows:
        assert row.ratio == row.dynamic.ms / row.static.ms
        assert row.ratio_grouped == row.grouped.ms / row.static.ms
        for measured in (row.static, row.dynamic, row.grouped):
            assert 0 < measured.quartiles[0] <= measured.ms <= measured.quartiles[1]


def test_memory_is_the_weights_and_what_a_step_has_at_its_peak(net, dynamic, found):
    rows = {(row.mode, row.batch): row for row in found.rows if row.layout == "nchw"}
    for form, network in (("static", net), ("dynamic", dynamic)):
        weights = sum(p.nbytes for p in network.parameters()) / 1e6
        largest = 3 * 8 * 16 * 16 * 4 / 1e6  # a feature map of three images
        infer, train = (getattr(rows[mode, 3], form).mb for mode in ("infer", "train"))
        assert infer > weights + largest
        assert train > infer + largest
        assert getattr(rows["infer", 1], form).mb < infer


def test_the_slowest_layers_say_how_they_run(found):
    assert all(isinstance(layer, LayerTime) for layer in found.layers)
    assert {layer.batch for layer in found.layers} == {3}
    for mode in ("infer", "train"):
        layers = [layer for layer in found.layers if layer.mode == mode]
        assert {layer.path for layer in layers} == {"depthwise", "pointwise", "fc"}
        more = [layer.dynamic_ms - layer.static_ms for layer in layers]
        assert more == sorted(more, reverse=True)
        ways = {layer.path: layer.way for layer in layers}
        in_c = native.available() and layers[0].layout == "nhwc"
        assert ways["pointwise"] == ("native" if in_c else "matmul")
        assert ways["fc"] == ""
        assert all((layer.grouped_ms is None) == (layer.path == "fc") for layer in layers)


def test_the_figures_are_plain_values_with_what_the_reader_needs(found):
    figures = json.loads(json.dumps(found.to_json("net")))
    keys = {"model", "mode", "batch", "layout", "static_ms", "dynamic_ms", "grouped_ms", "ratio", "ratio_grouped"}
    keys |= {"static_mb", "dynamic_mb", "grouped_mb", "mult_adds_ratio", "static_layout", "static_quartiles_ms"}
    for row in figures["rows"]:
        assert keys <= row.keys()
        assert row["ratio"] == row["dynamic_ms"] / row["static_ms"]
    assert figures["mult_adds"]["dynamic"] > figures["mult_adds"]["static"]
    assert {"device", "name", "threads", "torch", "dtype", "compile", "autotune"} == figures["machine"].keys()
    assert bars(figures).startswith(b"\x89PNG")


def test_without_a_static_network_it_is_the_frozen_one_and_one_layout_is_called_by_its_name(dynamic):
    found = run_bench(dynamic, SIZE, batches=(2,), seconds=0.01, layouts=("nhwc",), layers=False)
    assert [(row.layout, row.static.layout, row.dynamic.layout) for row in found.rows] == [("nhwc", "nhwc", "nhwc")]
    assert found.layers == ()


def test_the_grouped_trick_is_one_convolution_for_one_image(dynamic):
    assert choose_grouped(torch.empty(1, 3, 8, 8), None) == "single"
    assert choose_grouped(torch.empty(2, 3, 8, 8), None) == "grouped"


def state(model):
    """Everything of a network that measuring must not change."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(m.training, vars(m).get("chooser"), len(m._forward_pre_hooks)) for m in model.modules()]
    return tensors, modules, [(p.grad, p.stride(), p.dtype) for p in model.parameters()]


def same(one, other):
    return one[1:] == other[1:] and all(torch.equal(one[0][name], other[0][name]) for name in other[0])


@pytest.mark.parametrize("fails", [False, True])
def test_networks_threads_and_random_state_stay_as_they_were_also_if_a_step_raises(dynamic, monkeypatch, fails):
    dynamic = copy.deepcopy(dynamic).train()
    before, random = state(dynamic), torch.random.get_rng_state()
    threads = torch.get_num_threads()
    seen = []
    forward = DynamicConvNd.forward

    def watch(self, x):
        seen.append(torch.get_num_threads())
        if fails and self.training:
            raise RuntimeError("not today. Or tomorrow")
        return forward(self, x)

    monkeypatch.setattr(DynamicConvNd, "forward", watch)
    if fails:
        with pytest.raises(dysurgery.DysurgeryError, match=r"the dynamic network \(train, 1 image, nchw.*not today$"):
            run_bench(dynamic, SIZE, train=True, threads=threads + 1, **QUICK)
    else:
        run_bench(dynamic, SIZE, train=True, threads=threads + 1, dtype=torch.bfloat16, layouts=("nhwc",), **QUICK)
    assert threads + 1 in seen
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), random)
    assert same(before, state(dynamic))
    assert gc.isenabled()


def test_too_little_memory_is_said(dynamic, monkeypatch):
    forward = DynamicConvNd.forward

    def full(self, x):
        if len(x) == 7:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: not enough memory: you tried")
        return forward(self, x)

    monkeypatch.setattr(DynamicConvNd, "forward", full)
    with pytest.raises(dysurgery.DysurgeryError, match=r"infer, 7 images.*does not fit into memory: choose fewer"):
        run_bench(dynamic, SIZE, batches=(7,), seconds=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches": (1, 0)}, "1 image or more, got 1, 0"),
        ({"batches": ()}, "got none"),
        ({"layouts": ("nhcw",)}, "'nhcw'.*did you mean"),
        ({"layouts": ()}, "no layout"),
        ({"threads": 0}, "1 or more, got 0"),
        ({"seconds": 0.0}, "more than 0, got 0"),
    ],
)
def test_a_mistake_is_a_sentence(dynamic, options, words):
    with pytest.raises(dysurgery.UsageError, match=words):
        run_bench(dynamic, SIZE, **options)


def test_a_static_network_is_refused(net):
    with pytest.raises(dysurgery.UsageError, match="convert it first"):
        run_bench(net, SIZE)


def test_a_chooser_of_a_layer_of_its_own_is_what_is_measured(dynamic):
    network = copy.deepcopy(dynamic)
    network.depthwise.chooser = lambda x, geometry, train: "each"
    found = run_bench(network, SIZE, batches=(2,), seconds=0.01)
    assert {layer.path: layer.way for layer in found.layers}["depthwise"] == "each"


def test_a_frozen_network_is_not_trained(dynamic):
    with pytest.raises(dysurgery.UsageError, match="nothing to train"):
        run_bench(copy.deepcopy(dynamic).requires_grad_(False), SIZE, train=True)


def test_what_cannot_be_folded_is_noted():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + self.norm(self.stem(x)).mean()

    net = Twice().eval()
    dynamic = dysurgery.convert(net, torch.randn(1, *SIZE))
    found = run_bench(dynamic, SIZE, static=net, layouts=("nchw",), layers=False, **QUICK)
    assert any("static network 1 BatchNorm stays because" in note for note in found.notes)


@pytest.mark.slow
def test_compiled_networks_are_measured_too(dynamic):
    found = run_bench(dynamic, SIZE, batches=(2,), seconds=0.01, layouts=("nchw",), compile=True)
    assert found.machine["compile"]
    assert found.layers == ()
    assert len(found.rows) == 1


def test_the_copies_share_their_banks(dynamic):
    seen = set()
    forward = DynamicLayer.kernels

    def watch(self):
        seen.add(self.bank.data_ptr())
        return forward(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicLayer, "kernels", watch)
        run_bench(dynamic, SIZE, batches=(2,), seconds=0.01, layers=False, static=Net().eval())
    # Of the caller's network, of which the cost is counted, and of the one that is measured in all its forms.
    assert len(seen) <= 2 * sum(isinstance(module, DynamicLayer) for module in dynamic.modules())


def test_in_turns_every_step_runs_as_often_in_each_round_and_garbage_waits():
    calls = []
    steps = {name: lambda name=name: calls.append((name, gc.isenabled())) for name in "abc"}
    times = in_turns(steps, torch.device("cpu"), seconds=0.001)
    names = [name for name, _ in calls]
    rounds = ["".join(sorted(names[i : i + 3])) for i in range(0, len(names), 3)]
    assert set(rounds) == {"abc"}
    assert {len(found) for found in times.values()} == {len(rounds) - 1}
    assert not any(enabled for _, enabled in calls[3:])
    assert all(median(found) >= 0 for found in times.values())


RESULT = {
    "accuracy": {"before": 90.0, "control": None, "dynamic": 95.0},
    "accuracy_std": {"before": None, "control": None, "dynamic": 0.5},
    "mult_adds": {"static": 1000, "dynamic": 1100},
    "latency_ms": {"static": 1.0, "dynamic": 2.0},
}


def test_the_tradeoff_is_drawn_with_what_is_known(found):
    timing = {"network": "dynamic", "runtime": "onnxruntime", "images": 1, "milliseconds": 1.25}
    for pictured in (
        tradeoff(RESULT),
        tradeoff(RESULT, found.to_json("net"), [{"latency": [timing, {**timing, "images": 8}]}]),
        tradeoff({**RESULT, "mult_adds": {"static": None, "dynamic": 1100}, "latency_ms": {"dynamic": 2.0}}),
    ):
        assert pictured.startswith(b"\x89PNG")


def test_autotuned_layers_go_the_way_that_was_measured(dynamic, monkeypatch):
    def each(layer, call, train, seconds):
        return Situation.of(call.inputs(), train), "each", "grouped"

    monkeypatch.setattr(sys.modules["dysurgery.autotune"], "_fastest", each)
    found = run_bench(dynamic, SIZE, batches=(2,), layouts=("nchw",), seconds=0.01, autotune=True)
    assert found.machine["autotune"]
    ways = {layer.path: layer.way for layer in found.layers}
    assert {ways["depthwise"], ways["pointwise"], ways["fc"]} == {"each", ""}
    with pytest.raises(dysurgery.UsageError, match="autotune or compile, not both"):
        run_bench(dynamic, SIZE, autotune=True, compile=True)
