import copy
import os
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import torchvision
from timm.layers import StdConv2d
from torch import nn
from torch.nn import functional as F

import dysurgery
from dysurgery.errors import DysurgeryError
from dysurgery.fuse import fuse
from dysurgery.nn import DynamicConv2d, DynamicLayer, FusedActivation, FusedNorm
from dysurgery.nn.links import Link, links_of

IMAGE = torch.randn(1, 3, 64, 64, dtype=torch.float64)
# Network -> how many BatchNorms it has, and how many of them follow no convolution.
TIMM = {
    "test_resnet": (15, 0),
    "mobilenetv3_small_050": (34, 0),
    "tf_efficientnet_b0": (49, 0),  # Conv2dSame
    "repvgg_a0": (61, 17),  # its identity branches are a BatchNorm alone
}


def used(model):
    """The same network, in float64 and eval mode, with nothing trivially zero, one or equal."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, DynamicLayer):
            for parameter in module.parameters():
                noise = torch.randn_like(parameter) * parameter.detach().abs().mean()
                parameter.data += 0.3 * noise
    return model.double().eval()


def dynamic(model, example=IMAGE, **options):
    return used(dysurgery.convert(used(model), example, **options))


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("converted", [True, False])
def test_timm_models_compute_what_they_did_without_their_norms(name, converted):
    model = timm.create_model(name, num_classes=10)
    model = dynamic(model) if converted else used(model)
    done = fuse(model, IMAGE)
    total, stay = TIMM[name]
    assert (len(done.folded), len(done.left)) == (total - stay, stay)
    assert len(norms(done.model)) == stay
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(done.model(x), model(x), rtol=1e-9, atol=1e-9)
    assert done.relative_diff < 1e-12
    assert type(done.model) is type(model)
    assert not done.model.training


@pytest.mark.parametrize(
    ("build", "some", "count"),
    [
        (
            lambda: timm.create_model("mobilenetv3_small_050"),
            # Behind squeeze and excitation the mean is another.
            {Link("blocks.1.1.conv_pw", "blocks.1.1.bn1.act", "blocks.1.1.conv_dw")},
            22,
        ),
        (
            lambda: timm.create_model("test_resnet"),
            {Link("layer1.0.conv1", "layer1.0.act1", "layer1.0.conv2")},
            7,
        ),
        (
            lambda: torchvision.models.mobilenet_v2(),
            {Link("features.3.conv.0.0", "features.3.conv.0.2", "features.3.conv.1.0")},
            34,
        ),
        (
            lambda: torchvision.models.resnet18(),
            {Link("layer1.0.conv1", "layer1.0.relu", "layer1.0.conv2")},  # which is called behind the sum too
            8,
        ),
    ],
    ids=["mobilenetv3_small_050", "test_resnet", "torchvision mobilenet_v2", "torchvision resnet18"],
)
def test_what_follows_a_layer_is_done_in_its_call_and_is_the_same(build, some, count):
    torch.manual_seed(0)
    example = torch.randn(1, 3, 64, 64)
    model = dynamic(build(), IMAGE).float()
    folded = fuse(model, example).model
    links = links_of(folded)
    assert some <= set(links)
    assert sum(link.activation is not None for link in links) == count
    x = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        for run in (folded, fuse(folded, example).model, folded.to(memory_format=torch.channels_last)):
            assert (run(x).double() - expected).abs().max() <= 2e-5 * expected.abs().max()


class Followed(nn.Module):
    """A dynamic convolution, an activation and another one, and what else may happen to their outputs."""

    def __init__(self, how):
        super().__init__()
        self.first, self.act, self.second, self.how = nn.Conv2d(16, 16, 1), nn.Hardswish(), nn.Conv2d(16, 16, 1), how

    def forward(self, x):
        y = self.first(x)
        z = self.act(y)
        if self.how == "twice":
            z = self.act(z - 0.5)
        if self.how in ("before", "behind"):
            return self.second(z) + (y if self.how == "before" else z)
        z = self.second(z)
        return self.act(z) if self.how == "again" else z


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("plain", [Link("first", "act", "second")]),
        ("behind", [Link("first", "act", None)]),
        ("before", []),
        ("twice", [Link("first", "act", None)]),
        ("again", [Link("first", "act", "second")]),
        ("hooked", []),
    ],
)
def test_what_else_sees_an_output_keeps_it_as_it_is(how, expected):
    model = dysurgery.convert(Followed(how).eval(), torch.randn(1, 16, 8, 8), layers="all")
    if how == "hooked":
        model.act.register_forward_pre_hook(lambda module, args: None)
    done = fuse(model, torch.randn(1, 16, 8, 8)).model
    assert list(links_of(done)) == expected
    assert (type(done.act) is FusedActivation) == bool(expected)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(done(x), expected, rtol=1e-5, atol=1e-6)
        compiled = torch.compile(done, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)


def test_the_original_is_left_alone_and_in_place_changes_it():
    model = dynamic(timm.create_model("test_resnet", num_classes=5)).train()
    before = copy.deepcopy(model.state_dict())
    fused = dysurgery.fuse_bn(model, IMAGE)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    expected = model.eval()(IMAGE)
    assert dysurgery.fuse_bn(model, IMAGE, in_place=True) is model
    assert not norms(model)
    torch.testing.assert_close(model(IMAGE), expected, rtol=1e-9, atol=1e-9)
    assert list(fused.state_dict()) == list(model.state_dict())


def test_nothing_to_fold_says_so():
    for model in (timm.create_model("convnext_atto").double(), nn.Sequential(nn.Conv2d(3, 4, 3)).double()):
        with pytest.warns(UserWarning, match="nothing to fold in .*: it has no BatchNorm"):
            again = dysurgery.fuse_bn(model, IMAGE)
        assert again is not model
    fused = dysurgery.fuse_bn(dynamic(timm.create_model("test_resnet")), IMAGE)
    with pytest.warns(UserWarning, match="its 15 BatchNorms are folded already"):
        again = dysurgery.fuse_bn(fused, IMAGE)
    torch.testing.assert_close(again(IMAGE), fused(IMAGE), rtol=0, atol=0)


def test_something_folded_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dysurgery.fuse_bn(used(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), IMAGE)


class Ways(nn.Module):
    """Every way in which a BatchNorm can follow a convolution and yet not be folded, and two in which it can."""

    def __init__(self):
        super().__init__()
        self.plain, self.plain_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.out, self.out_bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.twice, self.twice_bn, self.other_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.last, self.shared_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.after_relu, self.relu_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.std, self.std_bn = StdConv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.batch, self.batch_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)
        self.tied, self.tied_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.tied_to = nn.Conv2d(8, 8, 1)
        self.tied_to.weight = self.tied.weight
        self.read, self.read_bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.norm_bn = nn.BatchNorm2d(8)
        self.unused_bn = nn.BatchNorm2d(8)
        self.matrix, self.matrix_bn = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.rows, self.rows_bn = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.plain_bn(self.plain(x))
        y = self.out(x)
        x = self.out_bn(y) + y
        x = self.twice_bn(self.twice(x)) + self.other_bn(self.twice(x))
        x = self.shared_bn(self.shared_bn(self.last(x)))
        x = self.relu_bn(F.relu(self.after_relu(x)))
        x = self.std_bn(self.std(x))
        x = self.batch_bn(self.batch(x))
        x = self.tied_to(self.tied_bn(self.tied(x)))
        x = self.read_bn(self.read(x)) * self.read.weight.mean()
        x = self.norm_bn(self.norm(x))
        x = self.matrix_bn(self.matrix(x.mean((2, 3))))
        return self.rows_bn(self.rows(x.unsqueeze(1).expand(-1, 6, -1)))


def test_what_cannot_be_folded_is_left_with_its_reason():
    model = used(Ways())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    done = fuse(model, x)
    assert done.folded == {"plain_bn": "plain", "matrix_bn": "matrix"}
    for path, words in {
        "out_bn": "goes elsewhere too",
        "twice_bn": "called 2 times",
        "shared_bn": "it is called 2 times",
        "relu_bn": "no convolution",
        "std_bn": "standardises",
        "batch_bn": "no running statistics",
        "tied_bn": "tied",
        "read_bn": "read outside",
        "norm_bn": "computed before each call",
        "unused_bn": "not called",
        "rows_bn": "2x6x6, of which axis 1 is not its channels",
    }.items():
        assert words in done.left[path], path
    assert done.folded.keys() | done.left.keys() == {p for p, m in model.named_modules() if "bn" in p}
    torch.testing.assert_close(done.model(x), model(x), rtol=1e-9, atol=1e-9)
    assert isinstance(done.model.plain_bn, FusedNorm)
    assert done.model.plain.bias is not None
    assert done.model.plain_bn.num_features == 8  # as a static model that is read has it


def test_a_sigmoid_gate_keeps_its_norm():
    model = dynamic(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), gate="sigmoid")
    assert "sigmoid" in fuse(model, IMAGE).left["2"]


class Listed(nn.Module):
    """Its BatchNorm has two names, and is called by a third that no one registered."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.alias, self.later = self.bn, [self.bn]

    def forward(self, x):
        return self.later[0](self.conv(x))


def test_a_norm_is_replaced_under_every_name_and_reference():
    model = used(Listed())
    done = fuse(model, IMAGE)
    assert done.folded == {"bn": "conv"}
    assert done.model.later[0] is done.model.alias is done.model.bn
    torch.testing.assert_close(done.model(IMAGE), model(IMAGE), rtol=1e-9, atol=1e-9)
    expected = model(IMAGE)
    with pytest.raises(DysurgeryError, match="computes something else"):
        dysurgery.fuse_bn(model, IMAGE, in_place=True)  # cannot reach the list
    torch.testing.assert_close(model(IMAGE), expected, rtol=0, atol=0)


def test_recordings_clips_and_what_upsamples():
    for conv, norm, shape in (
        (nn.Conv1d, nn.BatchNorm1d, (20,)),
        (nn.Conv3d, nn.BatchNorm3d, (6, 6, 6)),
        (nn.ConvTranspose2d, nn.BatchNorm2d, (6, 6)),
    ):
        x = torch.randn(2, 4, *shape, dtype=torch.float64)
        net = nn.Sequential(conv(4, 4, 1), conv(4, 6, 3, groups=2, stride=2, bias=False), norm(6), nn.ReLU())
        model = dynamic(net, x)
        fused = dysurgery.fuse_bn(model, x)
        assert not norms(fused)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_graph_module_is_folded_too(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.one, self.two, self.three = (nn.BatchNorm2d(4) for _ in range(3))
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x):
            x = self.stem(x)
            x = self.one(self.conv(x)) + self.two(self.conv(x))
            return self.three(F.conv2d(x, self.weight))

    model = dynamic(Net(), as_graph=True)
    done = fuse(model, IMAGE)
    assert done.folded == {"one": "conv_call1", "two": "conv_call2", "three": "conv2d"}
    torch.testing.assert_close(done.model(IMAGE), model(IMAGE), rtol=1e-9, atol=1e-9)
    frozen = dysurgery.freeze(done.model, layers=["conv_call2", "conv2d"])
    for number, network in enumerate((done.model, frozen)):
        folder = dysurgery.save(network, tmp_path / str(number))
        loaded = dysurgery.load(folder, model=Net().double())
        torch.testing.assert_close(loaded(IMAGE), network(IMAGE), rtol=0, atol=0)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_result_that_computes_something_else_is_an_error_and_the_model_stays(monkeypatch, in_place):
    model = used(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    expected = model(IMAGE)
    monkeypatch.setattr("dysurgery.fuse.scale_and_shift", lambda norm: (torch.ones(4), torch.zeros(4)))
    with pytest.raises(DysurgeryError, match="computes something else"):
        dysurgery.fuse_bn(model, IMAGE, in_place=in_place)
    torch.testing.assert_close(model(IMAGE), expected, rtol=0, atol=0)
    assert norms(model)


def test_outputs_that_rounding_decides_are_compared_layer_by_layer(monkeypatch):
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)

        def forward(self, x):
            return torch.sin(1e6 * self.bn(self.conv(x))).flatten(1).topk(20).indices.float()

    model = used(Chooses()).float()
    done = fuse(model, IMAGE.float())
    assert done.relative_diff > 1e-3
    assert done.rounding > 1e-4
    monkeypatch.setattr("dysurgery.fuse.scale_and_shift", lambda norm: (torch.ones(64), torch.zeros(64)))
    with pytest.raises(DysurgeryError, match="computes something else"):
        fuse(model, IMAGE.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_types_stay_within_their_rounding(dtype):
    model = dynamic(timm.create_model("test_resnet")).to(dtype)
    fused = dysurgery.fuse_bn(model, IMAGE.to(dtype))
    assert {p.dtype for p in fused.parameters()} == {dtype}


def test_a_folded_model_can_be_converted_further_compiled_and_saved(tmp_path):
    torch._dynamo.reset()
    model = used(timm.create_model("test_resnet", num_classes=5))
    dynamic = dysurgery.convert(dysurgery.fuse_bn(model, IMAGE), IMAGE)
    assert all(layer.bias_bank is not None for layer in dynamic.modules() if isinstance(layer, DynamicConv2d))
    torch.testing.assert_close(dynamic(IMAGE), model(IMAGE), rtol=1e-9, atol=1e-9)
    compiled = torch.compile(dynamic, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGE), dynamic(IMAGE))
    loaded = dysurgery.load(dysurgery.save(dynamic, tmp_path / "saved"))
    torch.testing.assert_close(loaded(IMAGE), dynamic(IMAGE), rtol=0, atol=0)


def test_a_fresh_process_opens_what_was_folded_and_frozen(tmp_path):
    model = dynamic(timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=5))
    model = dysurgery.freeze(dysurgery.fuse_bn(model, IMAGE), layers="blocks.1.0.conv_pw")
    dysurgery.save(model, tmp_path / "saved")
    torch.save(IMAGE, tmp_path / "image.pt")
    script = "import torch, dysurgery; torch.save(dysurgery.load('saved')(torch.load('image.pt')), 'output.pt')"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), model(IMAGE), rtol=1e-9, atol=1e-9)
