import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import nn

import dysurgery
from dysurgery.deployed import timings
from dysurgery.nn import DynamicLayer, handler

SIZE = (3, 32, 32)


class Net(nn.Module):
    """A stride, a depthwise, a pointwise and a dense convolution, a head; optional inputs, several outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.dense = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x, scale=None, mask=None, gain=1.0):
        x = torch.relu(self.stem(x))
        x = x + self.dense(torch.relu(self.norm(self.pointwise(self.depthwise(x))))).mean(1, keepdim=True)
        features = torch.relu(self.norm(self.pointwise(x))).mean((2, 3))
        if mask is not None:
            features = features * mask.float().mean((1, 2, 3)).unsqueeze(1)
        logits = self.head(features if scale is None else scale * features) * gain
        return logits if scale is None else {"logits": logits, "features": [features, x]}


def varied(model):
    """Make every kernel and every attention different, so that each image has kernels of its own."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, DynamicLayer):
                layer.bank.add_(0.3 * layer.bank.std() * torch.randn_like(layer.bank))
                layer.gate.fc2.weight.normal_()
    return model


@pytest.fixture
def net():
    return varied(dysurgery.convert(Net().eval(), torch.randn(1, *SIZE), k=3, linear=True))


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def apart(found, expected):
    found = torch.as_tensor(np.asarray(found))
    return ((found - expected).abs().max() / expected.abs().max()).item()


MODELS = [
    "test_resnet",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenetv3_small_050", "test_nfnet", "convnext_atto")),
]


@pytest.mark.parametrize("name", MODELS)
def test_an_onnx_file_of_a_timm_model_computes_the_same_for_any_number_of_images(name, tmp_path):
    static = timm.create_model(name).eval()
    model = varied(dysurgery.convert(static, torch.randn(1, 3, 64, 64), k=2))
    done = dysurgery.export(model, (3, 64, 64), tmp_path / "model.onnx")
    assert [check.shapes for check in done.checks] == [((batch, 3, 64, 64),) for batch in (1, 2, 5)]
    assert done.relative_diff < 1e-4
    assert done.size == done.path.stat().st_size
    running = session(done.path)
    for batch in (1, 7):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            assert apart(running.run(None, {done.inputs[0]: x.numpy()})[0], model(x)) < 1e-4
    known = {key: json.loads(value) for key, value in running.get_modelmeta().custom_metadata_map.items()}
    assert known["input_size"] == [3, 64, 64]
    assert tuple(known["mean"]) == static.pretrained_cfg["mean"]
    assert tuple(known["std"]) == static.pretrained_cfg["std"]
    assert known["interpolation"] == static.pretrained_cfg["interpolation"]
    assert known["crop_pct"] == static.pretrained_cfg["crop_pct"]


def test_a_pt2_file_runs_without_the_library_and_computes_the_same(net, tmp_path):
    done = dysurgery.export(net, SIZE, tmp_path / "net.pt2", "pt2", classes=["a", "b"], preprocessing={"mean": [0.5]})
    assert done.opset is None
    x = torch.randn(7, *SIZE)
    torch.save((x, net(x).detach()), tmp_path / "pair")
    code = (
        "import sys, torch; extra = {'metadata.json': ''};"
        "model = torch.export.load('net.pt2', extra_files=extra).module();"
        "(x, y), same = torch.load('pair'), torch.testing.assert_close; same(model(x), y); same(model(x[:1]), y[:1]);"
        "assert 'dysurgery' not in sys.modules; print(extra['metadata.json'])"
    )
    fresh = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    assert json.loads(fresh.stdout) == {"mean": [0.5], "input_size": list(SIZE), "classes": ["a", "b"]}


@pytest.mark.parametrize("format", ["onnx", pytest.param("pt2", marks=pytest.mark.slow)])
def test_with_dynamic_size_images_of_any_height_and_width_are_taken(net, format, tmp_path):
    path = tmp_path / f"net.{format}"
    done = dysurgery.export(net, SIZE, path, format, dynamic_size=True)
    assert done.relative_diff < 1e-4
    assert {check.shapes[0] for check in done.checks} >= {(2, 3, 64, 96), (2, 3, 39, 51)}
    x = torch.randn(3, 3, 45, 20)
    found = session(path).run(None, {"x": x.numpy()})[0] if format == "onnx" else torch.export.load(path).module()(x)
    assert apart(found.detach() if format == "pt2" else found, net(x).detach()) < 1e-4


def test_axes_and_outputs_of_an_onnx_file_have_names(net, tmp_path):
    example = (torch.randn(2, *SIZE), torch.randn(2, 16), torch.ones(2, 1, 32, 32, dtype=torch.bool))
    done = dysurgery.export(net, example, tmp_path / "net.onnx", dynamic_size=True)
    assert done.inputs == ("x", "scale", "mask")
    assert done.outputs == ("logits", "features_0", "features_1")
    running = session(done.path)
    assert [given.shape for given in running.get_inputs()] == [
        ["batch", 3, "height", "width"],
        ["batch", 16],
        ["batch", 1, "height", "width"],
    ]
    assert running.get_outputs()[0].shape == ["batch", 10]


@pytest.mark.slow
def test_keyword_arguments_may_come_in_any_order_and_what_is_no_tensor_is_a_constant(net, tmp_path):
    example = {"mask": torch.ones(1, 1, 32, 32), "gain": 3.0, "x": torch.randn(1, *SIZE)}
    done = dysurgery.export(net, example, tmp_path / "net.onnx", batches=[1, 4])
    assert sorted(done.inputs) == ["mask", "x"]
    mask, x = torch.rand(3, 1, 32, 32), torch.randn(3, *SIZE)
    found = session(done.path).run(None, {"x": x.numpy(), "mask": mask.numpy()})[0]
    assert apart(found, net(x, mask=mask, gain=3.0).detach()) < 1e-4


class Several(nn.Module):
    """Many layers on one input, each with an output of its own."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return [layer(x).mean(1) for layer in self.layers]


GEOMETRIES = {
    1: lambda: [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        nn.Conv1d(4, 6, 1, stride=3),
        nn.Conv1d(4, 6, 4, padding="same", bias=False),
        nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
    ],
    2: lambda: [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(2, 3), bias=False),
        nn.Conv2d(4, 8, (2, 4), groups=2, padding="same"),
        nn.Conv2d(4, 4, 5, stride=2, padding=2, groups=4),
        nn.Conv2d(4, 6, 1, stride=2),
        nn.Conv2d(4, 6, 1, groups=2),
        nn.Conv2d(4, 6, 1, padding=1),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"),
        nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, output_padding=1, groups=2, dilation=(2, 1)),
        nn.ConvTranspose2d(4, 6, 1, bias=False),
        Conv2dSame(4, 6, 3, stride=2),
        StdConv2d(4, 6, 3, padding=1),
        nn.Linear(14, 5),
    ],
    3: lambda: [
        nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), groups=2),
        nn.Conv3d(4, 6, 1, bias=False),
        nn.ConvTranspose3d(4, 6, 2, stride=2, output_padding=(0, 1, 0)),
    ],
}


@pytest.mark.parametrize(
    ("axes", "format"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "onnx"), (2, "onnx"), (3, "onnx"), (2, "pt2"))],
)
def test_every_geometry_is_exported_as_it_is(axes, format, tmp_path):
    gates = ("softmax", "sigmoid")
    static = GEOMETRIES[axes]()
    layers = [handler(each).from_static(each, k=3, gate=gates[i % 2 if i < 3 else 0]) for i, each in enumerate(static)]
    model = varied(Several(layers)).eval()
    size = (4, 9, 11, 14)[: axes + 1] if axes != 2 else (4, 13, 14)
    done = dysurgery.export(model, size, tmp_path / f"several.{format}", format)
    assert done.relative_diff < 1e-5


def test_the_model_and_the_random_state_stay_as_they_were(net, tmp_path):
    net.train()
    net.head.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    training = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    attributes = {path: set(vars(module)) for path, module in net.named_modules()}
    done = dysurgery.export(net, SIZE, tmp_path / "net.onnx")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == training
    assert {path: set(vars(module)) for path, module in net.named_modules()} == attributes
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    x = torch.randn(2, *SIZE)
    expected = net.eval()(x).detach()  # the file computes what eval mode does
    assert apart(session(done.path).run(None, {"x": x.numpy()})[0], expected) < 1e-4


@pytest.mark.slow
def test_a_static_and_a_compiled_model_are_exported_too(tmp_path):
    static = Net().eval()
    done = dysurgery.export(torch.compile(static), SIZE, tmp_path / "net.onnx", opset=18)
    assert done.opset == 18
    x = torch.randn(3, *SIZE)
    assert apart(session(done.path).run(None, {"x": x.numpy()})[0], static(x).detach()) < 1e-4


@pytest.mark.slow
def test_half_precision_is_exported_and_bfloat16_where_it_runs(net, tmp_path):
    assert dysurgery.export(net.half(), SIZE, tmp_path / "half.onnx").relative_diff < 5e-2
    assert session(tmp_path / "half.onnx").get_inputs()[0].type == "tensor(float16)"
    with pytest.raises(dysurgery.DysurgeryError, match=r"bfloat16.*model\.float\(\).*pt2"):
        dysurgery.export(net.bfloat16(), SIZE, tmp_path / "net.onnx")
    assert dysurgery.export(net, SIZE, tmp_path / "net.pt2", "pt2").relative_diff < 2e-1


class Counting(nn.Module):
    """A number of Python's own changes from call to call: a traced program keeps the one that it saw."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class OneBatch(nn.Module):
    def forward(self, x):
        if x.shape[0] == 2:
            return x
        return x + 1


class OneSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 4)

    def forward(self, x):
        return self.head(x.flatten(1))


@pytest.mark.parametrize("format", ["onnx", pytest.param("pt2", marks=pytest.mark.slow)])
def test_a_file_that_would_compute_something_else_is_not_kept(format, tmp_path):
    path = tmp_path / f"old.{format}"
    path.write_text("old")
    with pytest.raises(dysurgery.DysurgeryError, match=r"something else.*1x3x32x32"):
        dysurgery.export(Counting(), SIZE, path, format, force=True)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_model_that_looks_at_the_batch_size_is_refused(tmp_path):
    with pytest.raises(dysurgery.DysurgeryError, match="OneBatch"):
        dysurgery.export(OneBatch(), SIZE, tmp_path / "net.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_one_size_is_refused_at_any_size_with_the_way_out(tmp_path):
    with pytest.raises(dysurgery.DysurgeryError, match="leave out --dynamic-size"):
        dysurgery.export(OneSize(), SIZE, tmp_path / "net.pt2", "pt2", dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": "net.onx", "format": "onx"}, ["unknown format 'onx'", "did you mean 'onnx'"]),
        ({"path": "net.pt2"}, ["net.pt2", ".onnx"]),
        ({"path": "net"}, [".onnx"]),
        ({"path": "net.pt2", "format": "pt2", "opset": 20}, ["opset", "pt2"]),
        ({"batches": []}, ["batches", "none"]),
        ({"batches": [1, 0]}, ["batches", "1, 0"]),
        ({"example": (3, 0, 32)}, ["(3, 0, 32)"]),
        ({"example": [torch.randn(1, 3, 32, 32)]}, ["list"]),
        ({"example": {"x": torch.tensor(1.0)}}, ["batch"]),
        ({"preprocessing": {"mean": object()}}, ["plain values"]),
    ],
)
def test_a_wrong_request_is_answered_by_a_sentence_and_leaves_nothing_behind(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dysurgery.UsageError) as caught:
        dysurgery.export(nn.Identity(), **{"example": SIZE, "path": "net.onnx", **arguments})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_said_at_once(net, tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_text("old")
    (tmp_path / "folder.onnx").mkdir()
    for path, words in (
        ("net.onnx", "force=True"),
        ("folder.onnx", "is a folder"),
        ("net.onnx/a.onnx", "cannot write"),
    ):
        with pytest.raises(dysurgery.DysurgeryError, match=words):
            dysurgery.export(net, SIZE, tmp_path / path)
    with pytest.raises(dysurgery.DysurgeryError, match="meta device"):
        dysurgery.export(Net().to("meta"), SIZE, tmp_path / "meta.onnx")
    with pytest.raises(dysurgery.DysurgeryError, match="does not run on an example of shape"):
        dysurgery.export(net, (1, 32, 32), tmp_path / "one.onnx")
    with pytest.raises(dysurgery.DysurgeryError, match="cannot be written in opset 7"):
        dysurgery.export(net, SIZE, tmp_path / "seven.onnx", opset=7)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(dysurgery.DysurgeryError, match="needs onnxscript and onnxruntime: pip install onnxscript onnx"):
        dysurgery.export(net, SIZE, tmp_path / "lacking.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder.onnx", "net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "old"


@pytest.mark.slow
def test_nothing_is_printed_or_logged(tmp_path):
    code = (
        "import torch, dysurgery; from torch import nn;"
        "dysurgery.export(dysurgery.nn.DynamicConv2d(3, 4, 3), (3, 8, 8), 'a.onnx', opset=18)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_folded_network_is_exported_and_timed_beside_the_static_one(tmp_path):
    static = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    model = varied(dysurgery.convert(static, torch.randn(1, *SIZE), layers="all"))
    folded = dysurgery.fuse_bn(model, torch.randn(1, *SIZE))
    done = dysurgery.export(folded, SIZE, tmp_path / "net.onnx", batches=[3])
    x = torch.randn(2, *SIZE)
    assert apart(session(done.path).run(None, {done.inputs[0]: x.numpy()})[0], model(x).detach()) < 1e-4
    found = timings(folded, SIZE, done, images=(1, 2), seconds=0)
    places = [(t.network, t.runtime) for t in found if t.images == 2]
    assert places == [(n, r) for n in ("dynamic", "static") for r in ("torch", "onnxruntime")]
    assert all(timing.milliseconds > 0 for timing in found)
    with pytest.raises(dysurgery.UsageError, match="got 0"):
        timings(folded, SIZE, done, images=[0])
