"""The ways that were measured are the ways that are gone, here and in copies, and nothing else changes."""

import copy
import json
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dysurgery
from dysurgery import DynamicConv2d, UsageError
from dysurgery.autotune import set_ways, ways_of
from dysurgery.nn.execution import WAYS, Geometry, Situation, Tuned, choose, convolve

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 12, 1)

    def forward(self, x):
        return self.point(self.second(self.first(self.norm(self.stem(x)).relu()).relu()).relu()).mean((2, 3))


@pytest.fixture
def dynamic():
    torch.manual_seed(0)
    network = dysurgery.convert(Net().double().eval(), IMAGES, k=3)
    for layer in network.modules():  # kernels that differ
        if isinstance(layer, DynamicConv2d):
            nn.init.normal_(layer.bank, std=0.1)
    return network


@pytest.fixture
def always_each(monkeypatch):
    """As if "each" were the fastest way everywhere."""

    def fastest(layer, call, train, seconds):
        return Situation.of(call.inputs(), train), "each", "grouped"

    monkeypatch.setattr(sys.modules["dysurgery.autotune"], "_fastest", fastest)


def gone(network, x):
    """The way that each layer goes for x."""
    seen, network = {}, copy.deepcopy(network)
    for path, layer in network.named_modules():
        if isinstance(layer, DynamicConv2d):

            def note(x, geometry, train=False, path=path, asked=layer.chooser):
                seen[path] = asked(x, geometry, train)
                return seen[path]

            layer.chooser = note
    network(x)
    return seen


def test_what_was_found_is_gone_and_the_function_stays_the_same(dynamic):
    expected, state = dynamic(IMAGES), {name: t.clone() for name, t in dynamic.state_dict().items()}
    found = dysurgery.autotune(dynamic, IMAGES, seconds=0.1)
    assert found.keys() == {"first", "second", "point"}
    assert found["first"].keys() == {f"cpu {torch.get_num_threads()} float64 nchw 3x8x16x16 infer"}
    with torch.no_grad():
        assert gone(dynamic, IMAGES) == {path: way for path, each in found.items() for way in each.values()}
    torch.testing.assert_close(dynamic(IMAGES), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(t, state[name]) for name, t in dynamic.state_dict().items())


def test_equal_layers_are_measured_once_and_go_the_same_way(dynamic):
    found = dysurgery.autotune(dynamic, IMAGES, seconds=0.1)
    assert found["first"] == found["second"]


def test_the_choice_is_for_the_situation_that_was_measured_and_adds_up(dynamic, always_each):
    for ways in (slice(0, 2), slice(0, 3)):
        dysurgery.autotune(dynamic, IMAGES[ways], seconds=0.1)
    dysurgery.autotune(dynamic.train(), IMAGES, seconds=0.1)
    measured = {Situation.parse(text) for text in ways_of(dynamic)["first"]}
    assert {(s.shape[0], s.mode) for s in measured} == {(2, "infer"), (3, "infer"), (3, "train")}
    x, geometry = torch.randn(5, 8, 16, 16, dtype=torch.float64), Geometry((8, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert dynamic.first.chooser(x, geometry, False) == choose(x, geometry, False)


def test_training_leaves_statistics_gradients_and_hooks_alone(dynamic):
    dynamic.train()
    dynamic(IMAGES).sum().backward()
    before = {name: t.clone() for name, t in dynamic.state_dict().items()}
    gradients, calls = {name: p.grad.clone() for name, p in dynamic.named_parameters()}, []
    dynamic.first.gate.register_forward_hook(lambda *_: calls.append(1) if dynamic.training else None)
    generator = torch.get_rng_state()
    dysurgery.autotune(dynamic, IMAGES, seconds=0.1)
    assert dynamic.training
    assert len(calls) <= 1  # the run that finds the shapes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t, before[name]) for name, t in dynamic.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in dynamic.named_parameters())


def test_copies_and_saved_folders_keep_it(dynamic, tmp_path, always_each):
    dysurgery.autotune(dynamic, IMAGES, seconds=0.1)
    ways = ways_of(dynamic)
    assert ways.keys() == {"first", "second", "point"}
    assert ways_of(copy.deepcopy(dynamic)) == ways
    dysurgery.save(dynamic, tmp_path / "net")
    again = dysurgery.load(tmp_path / "net", model=Net())
    assert ways_of(again) == ways
    assert torch.equal(again(IMAGES), dynamic(IMAGES))


def test_a_way_that_this_version_does_not_know_is_left_to_the_default(dynamic):
    situation = f"cpu {torch.get_num_threads()} float64 nchw 3x8x16x16 infer"
    set_ways(dynamic, {"first": {situation: "by magic"}})
    with torch.no_grad():
        assert gone(dynamic, IMAGES)["first"] in WAYS


@pytest.mark.parametrize("ways", [{"norm": {}}, {"first": {"nonsense": "grouped"}}])
def test_a_damaged_config_is_one_sentence(dynamic, tmp_path, ways):
    dysurgery.save(dynamic, tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    (tmp_path / "net" / "config.json").write_text(json.dumps(config | {"ways": ways}))
    with pytest.raises(dysurgery.DysurgeryError, match="is damaged"):
        dysurgery.load(tmp_path / "net", model=Net())


def test_a_situation_is_text_and_back():
    situation = Situation.of(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), train=True)
    assert str(situation).endswith(" float32 nhwc 2x3x4x5 train")
    assert Situation.parse(str(situation)) == situation


def test_under_compile_the_measured_way_is_not_asked_for_on_a_cpu(dynamic, always_each):
    dysurgery.autotune(dynamic, IMAGES, seconds=0.1)
    assert isinstance(dynamic.first.chooser, Tuned)
    with torch.no_grad():
        compiled = torch.compile(dynamic, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(IMAGES), dynamic(IMAGES), rtol=1e-12, atol=1e-12)


def test_under_compile_a_gpu_goes_the_measured_way_for_the_measured_batch():
    geometry = Geometry((6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    tuned = Tuned({Situation("cuda", 0, "float32", "nchw", (2, 4, 7, 7), "infer"): "outputs"})
    channels = []

    def backend(graph, _):
        weights = [node.args[1] for node in graph.graph.nodes if node.target is torch.conv2d]
        channels.extend(weight.meta["example_value"].shape[0] for weight in weights)
        return graph

    def run(x, pi, bank):
        return convolve(x, pi, bank, None, geometry, tuned)

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    with FakeTensorMode(), torch.no_grad():  # as there need not be a GPU
        for batch in (2, 5):
            shapes = (batch, 4, 7, 7), (batch, 3), (3, 6 * 4 * 9)
            assert compiled(*(torch.empty(shape, device="cuda") for shape in shapes)).shape == (batch, 6, 7, 7)
    assert channels == [3 * 6, 5 * 6]  # K * Cout outputs; then five samples side by side, as nobody measured that


def test_a_layer_whose_default_is_the_fastest_keeps_the_default_chooser(dynamic, monkeypatch, always_each):
    dysurgery.autotune(dynamic, IMAGES)
    assert isinstance(dynamic.first.chooser, Tuned)

    def default(layer, call, train, seconds):
        return Situation.of(call.inputs(), train), "grouped", "grouped"

    monkeypatch.setattr(sys.modules["dysurgery.autotune"], "_fastest", default)
    found = dysurgery.autotune(dynamic, IMAGES)
    assert [*found["first"].values()] == ["grouped"]
    assert ways_of(dynamic) == {}
    assert dynamic.first.chooser is choose


def test_a_way_that_leaves_channels_last_is_not_taken(dynamic, monkeypatch):
    def in_turns(steps, device, *, seconds):
        measured.append(set(steps))
        return {way: [float(way != "grouped")] for way in steps}  # as if it were the fastest by far

    measured = []
    monkeypatch.setattr(sys.modules["dysurgery.autotune"], "in_turns", in_turns)
    assert {*dysurgery.autotune(dynamic, IMAGES)["first"].values()} == {"grouped"}
    last = IMAGES.contiguous(memory_format=torch.channels_last)
    found = dysurgery.autotune(dynamic.to(memory_format=torch.channels_last), last)
    assert {*found["first"].values()} == {"stacked"}
    assert all("grouped" not in ways for ways in measured[2:])


def test_errors_say_what_to_do(dynamic):
    with pytest.raises(UsageError, match="convert the model first"):
        dysurgery.autotune(Net(), IMAGES.float())
    with pytest.raises(UsageError, match="more than 0, got 0"):
        dysurgery.autotune(dynamic, IMAGES, seconds=0)
    with pytest.raises(dysurgery.DysurgeryError, match="does not run on an example"):
        dysurgery.autotune(dynamic, IMAGES[:, :2])
