import random

import numpy
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.trace import trace

IMAGE = torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "tf_efficientnet_b0", "densenet121", "convnext_atto", "ghostnet_050"]
)
def test_every_convolution_that_runs_is_a_site_in_run_order_with_its_shapes(name):
    model = timm.create_model(name).eval()
    seen = []
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd):
            module.register_forward_hook(
                lambda m, i, o, path=path: seen.append((path, tuple(i[0].shape), tuple(o.shape)))
            )
    model(IMAGE)
    expected, seen = list(seen), []
    found = [(s.path, c.input_shape, c.output_shape) for s in trace(model, IMAGE).sites for c in s.calls]
    assert found == expected


def test_the_model_its_mode_and_the_random_state_are_untouched():
    model = timm.create_model("mobilenetv3_small_050", drop_rate=0.5, drop_path_rate=0.5).train()
    model.blocks[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    states = (torch.random.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy())
    trace(model, IMAGE)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Branching(nn.Module):
    """Its root cannot be traced, nor can one of its blocks; another calls a shared convolution twice."""

    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())

        def forward(self, x):
            return self.inner(x) if x.mean() > -100 else x

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.stages = nn.ModuleList([nn.Sequential(self.Stubborn(), nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 1)])
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, images):
        x = self.stem(torch.stack(list(images)))
        for stage in self.stages:
            x = stage(x)
        return self.stages[1](x)


def test_what_cannot_be_traced_is_gone_through_child_by_child_and_reported():
    graph = trace(Branching(), ([torch.randn(3, 16, 16)] * 2,))
    assert [site.path for site in graph.sites] == ["stem", "stages.0.0.inner.0", "stages.0.1", "stages.1", "unused"]
    assert [len(site.calls) for site in graph.sites] == [1, 1, 1, 2, 0]
    assert set(graph.graphs) == {"stages.0", "stages.0.0.inner"}
    assert any(note.startswith("the model (Branching) is not traced: ") for note in graph.notes)
    assert any(note.startswith("stages.0.0 (Stubborn) is called as a whole: ") for note in graph.notes)


def test_a_shared_module_is_one_site_with_all_its_names():
    graph = trace(timm.create_model("coat_lite_tiny", img_size=64).eval(), IMAGE)
    site = next(site for site in graph.sites if site.path == "crpe1.conv_list.0")
    assert "serial_blocks1.0.factoratt_crpe.crpe.conv_list.0" in site.aliases
    assert len(site.calls) == 2


class Reads(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.twin = nn.Conv2d(8, 8, 3)
        if how == "tied":
            self.twin.weight = self.conv.weight
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x):
        x = self.stem(x)
        if self.how == "dtype":
            x = x.to(self.conv.weight.dtype)
        if self.how == "norm":
            x = x * self.conv.weight.norm()
        x = self.twin(self.conv(x))
        return F.conv2d(x, self.weight / self.weight.norm() if self.how == "computed" else self.weight)


@pytest.mark.parametrize(
    ("how", "path", "words"),
    [
        ("dtype", "conv", "read outside its own call"),
        ("norm", "conv", "read outside its own call"),
        ("tied", "conv", "tied to another"),
        ("computed", "conv2d", "computed in forward"),
        ("plain", "conv2d", "as_graph=True"),
    ],
)
def test_a_weight_that_others_use_or_compute_is_refused_with_the_reason(how, path, words):
    sites = {site.path: site for site in trace(Reads(how), IMAGE).sites}
    assert words in sites[path].refusal
    assert sites["stem"].refusal is None


def test_a_functional_convolution_stands_where_it_runs():
    sites = trace(Reads("plain"), IMAGE).sites
    assert [site.path for site in sites] == ["stem", "conv", "twin", "conv2d"]
    assert sites[-1].calls[0].output_shape == (1, 8, 56, 56)
    assert trace(Reads("plain"), IMAGE, as_graph=True).sites[-1].refusal is None


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.masked = nn.Conv2d(3, 4, 3)

    def forward(self, x, mask=None, *, flag: bool = False):
        return self.conv(x) if mask is None else self.masked(x * mask)


def test_optional_arguments_keep_their_defaults_and_dicts_are_keyword_arguments():
    for example, called in ((IMAGE, "conv"), ({"x": IMAGE}, "conv"), ((IMAGE, torch.ones(1)), "masked")):
        graph = trace(Optional(), example)
        assert [site.path for site in graph.sites if site.calls] == [called]
        assert "" in graph.graphs


def test_a_graph_that_takes_another_way_than_the_model_is_not_used():
    class Tricked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.a(x) if isinstance(x, torch.Tensor) else self.b(x)

    graph = trace(Tricked(), IMAGE)
    assert [len(site.calls) for site in graph.sites] == [1, 0]
    assert not graph.graphs
    assert "control flow" in graph.notes[0]


def test_models_and_examples_that_cannot_be_traced_are_refused_with_the_way_out():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    for model, words in (
        (torch.compile(net), "_orig_mod"),
        (torch.jit.trace(net, IMAGE), "scripted"),
        (nn.DataParallel(net), "model.module"),
        ("resnet18", "torch.nn.Module"),
    ):
        with pytest.raises(UsageError, match=words):
            trace(model, IMAGE)
    with pytest.raises(UsageError, match="wrap it in a tuple"):
        trace(net, [IMAGE])
    with pytest.raises(DysurgeryError, match=r"does not run on an example of shape \(1, 4, 8, 8\)"):
        trace(net, torch.zeros(1, 4, 8, 8))


def test_a_detector_is_reached_although_its_root_is_not_traced():
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    graph = trace(model, ([torch.rand(3, 320, 320)],))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert len([site for site in graph.sites if site.calls]) == convolutions
