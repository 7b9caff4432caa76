import pytest
import timm
import torch
import torchvision
from torch import nn

from dysurgery.errors import UsageError
from dysurgery.select import PRESETS, Selection, select
from dysurgery.trace import trace

IMAGE = torch.randn(1, 3, 64, 64)


@pytest.fixture(scope="module")
def graphs():
    names = ("resnet18", "mobilenetv2_100", "mobilenetv3_small_050", "resnet26")
    return {name: trace(timm.create_model(name).eval(), IMAGE) for name in names}


def static(graph, **options):
    return {d.site.path: d.reason for d in select(graph, Selection(**options)) if not d.dynamic}


def test_all_but_first_leaves_the_stem_static(graphs):
    assert static(graphs["mobilenetv2_100"]) == {"conv_stem": "first convolution"}


def test_blocks_also_leaves_the_1x1_before_the_pool_static(graphs):
    assert set(static(graphs["mobilenetv2_100"], layers="blocks")) == {"conv_stem", "conv_head"}
    graph = trace(torchvision.models.mobilenet_v2().eval(), IMAGE)
    assert set(static(graph, layers="blocks")) == {"features.0.0", "features.18.0"}


def test_a_residual_branch_that_ends_in_a_1x1_is_no_head(graphs):
    assert "conv1" in static(graphs["resnet26"], layers="blocks")
    assert not any(
        path.startswith("layer4") and "conv3" in path for path in static(graphs["resnet26"], layers="blocks")
    )


def test_convolutions_on_1x1_maps_are_static_unless_all_are_asked_for(graphs):
    reasons = static(graphs["mobilenetv3_small_050"])
    assert reasons["blocks.0.0.se.conv_reduce"] == reasons["conv_head"] == "sees a 1x1 map"
    assert static(graphs["mobilenetv3_small_050"], layers="all") == {}


def test_include_exclude_and_kinds_narrow_it_down(graphs):
    graph = graphs["mobilenetv2_100"]
    chosen = {
        d.site.path for d in select(graph, Selection(include=(r"blocks\.[56]",), exclude=("conv_pwl$",))) if d.dynamic
    }
    assert chosen
    assert all(path.startswith(("blocks.5", "blocks.6")) and not path.endswith("pwl") for path in chosen)
    kinds = {d.site.kind for d in select(graph, Selection(kinds=("depthwise",))) if d.dynamic}
    assert kinds == {"depthwise"}


def test_linear_layers_are_sites_only_when_asked_for():
    model = timm.create_model("resnet18").eval()
    graph = trace(model, IMAGE, linear=True)
    assert "fc" not in static(graph, linear=True)
    assert static(graph, linear=True, layers="blocks")["fc"] == "classifier"
    assert all(site.kind != "linear" for site in trace(model, IMAGE).sites)


def test_every_decision_has_a_reason(graphs):
    for graph in graphs.values():
        for layers in PRESETS:
            assert all(decision.reason for decision in select(graph, Selection(layers=layers)))


def test_a_pattern_that_matches_nothing_is_an_error_with_counts_and_near_names(graphs):
    with pytest.raises(UsageError) as caught:
        select(graphs["resnet18"], Selection(include=("layer1", "layre4")))
    for words in ("'layre4'", "did you mean 'layer4'? 5 convolutions", "'layer1' 4", "of 20 convolutions"):
        assert words in str(caught.value)
    with pytest.raises(UsageError, match="named like 'conv1'"):
        select(graphs["resnet18"], Selection(exclude=("zzz",)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "block"}, "did you mean 'blocks'"),
        ({"kinds": ("point",)}, "pointwise, depthwise, dense"),
        ({"kinds": ()}, "no kind"),
        ({"include": ("(",)}, "no regular expression"),
    ],
)
def test_wrong_options_are_refused_with_what_was_expected(options, words):
    with pytest.raises(UsageError, match=words):
        Selection(**options)


def test_an_auxiliary_head_that_does_not_run_stays_static():
    graph = trace(torchvision.models.googlenet(init_weights=False).eval(), torch.randn(1, 3, 96, 96))
    assert static(graph)["aux1.conv.conv"] == "not called on the example"


def test_the_first_convolution_is_the_first_that_runs():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = nn.Conv2d(4, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.b(self.a(x))

    assert static(trace(Late(), IMAGE)) == {"a": "first convolution"}
