import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dysurgery
from dysurgery.cost import MultAdds

FAMILIES = (
    "resnet18",
    "mobilenetv2_100",
    "mobilenetv3_small_050",
    "efficientnet_lite0",
    "tf_efficientnet_b0",
    "densenet121",
    "convnext_atto",
    "regnety_002",
    "ghostnet_050",
    "coat_lite_tiny",
    "repvgg_a0",
    "mixnet_s",
)


def flops(model, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", FAMILIES)
def test_mult_adds_are_half_of_torchs_flops_plus_the_pooling_that_torch_does_not_count(name):
    options = {"img_size": 64} if name == "coat_lite_tiny" else {}
    model = timm.create_model(name, num_classes=10, **options).eval()
    x = torch.randn(1, 3, 64, 64)
    static = dysurgery.cost(model, x)
    assert static.mult_adds.total == static.mult_adds.base == flops(model, x) // 2
    dynamic = dysurgery.convert(model, x)
    report = dysurgery.cost(dynamic, x)
    assert report.mult_adds.total - report.mult_adds.pooling == flops(dynamic, x) // 2
    assert report.mult_adds.base == static.mult_adds.base
    assert report.params == sum(parameter.numel() for parameter in dynamic.parameters())


@pytest.mark.parametrize(
    ("model", "layers", "params", "mult_adds"),
    [
        (lambda: timm.create_model("resnet18"), "all-but-first", 45.47, 1.861),
        (lambda: timm.create_model("mobilenetv2_100"), "all-but-first", 12.40, None),
        (lambda: timm.create_model("mobilenetv2_100"), "blocks", 11.15, None),
        (lambda: timm.create_model("mobilenetv2_050"), "all-but-first", 4.57, None),
        (lambda: timm.create_model("mobilenetv2_050"), "blocks", 3.95, None),
        (lambda: torchvision.models.mobilenet_v2(width_mult=0.75), "all-but-first", 7.95, None),
        (lambda: torchvision.models.mobilenet_v2(width_mult=0.75), "blocks", 7.01, None),
    ],
)
def test_the_published_figures_come_out(model, layers, params, mult_adds):
    plan = dysurgery.plan(model().eval(), torch.randn(1, 3, 224, 224), layers=layers)
    assert round(plan.params[1] / 1e6, 2) == params
    if mult_adds:
        assert round(plan.mult_adds[1].total / 1e9, 3) == mult_adds


@pytest.mark.parametrize("batch", [2, 3])
def test_figures_are_per_image_whatever_the_batch(batch):
    model = dysurgery.convert(timm.create_model("mobilenetv3_small_050").eval(), torch.randn(1, 3, 64, 64))
    one, several = (dysurgery.cost(model, torch.randn(n, 3, 64, 64)) for n in (1, batch))
    assert one == several


def test_the_formula_is_the_papers():
    layer = dysurgery.DynamicConv2d(16, 24, 3, padding=1, k=5)
    report = dysurgery.cost(nn.Sequential(layer), torch.randn(1, 16, 10, 12))
    positions = 10 * 12
    assert report.mult_adds == MultAdds(
        base=positions * 24 * 16 * 9,
        pooling=positions * 16,
        attention=16 * 4 + 4 * 5,
        aggregation=5 * (24 * 16 * 9 + 24),
    )


def test_linear_layers_pool_only_what_lies_between_batch_and_channels():
    layer = dysurgery.DynamicLinear(16, 24, k=2)
    flat, rows = (
        dysurgery.cost(nn.Sequential(layer), (torch.randn(shape),)).mult_adds for shape in ((1, 16), (1, 7, 16))
    )
    assert (flat.pooling, rows.pooling) == (0, 7 * 16)
    assert rows.base == 7 * flat.base == 7 * 16 * 24


def test_functional_convolutions_and_products_are_counted():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

        def forward(self, x):
            y = torch.nn.functional.conv2d(x, self.weight).flatten(2)
            return y @ y.transpose(1, 2)

    report = dysurgery.cost(Functional(), torch.randn(1, 3, 10, 10))
    assert report.mult_adds.total == 64 * 8 * 27 + 8 * 8 * 64


def test_the_attention_of_torch_is_counted_in_inference_too():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    tokens = torch.zeros(1, 5, 16)
    products = 5 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 5 * 5 * 16
    assert dysurgery.cost(encoder, tokens).mult_adds.total == products
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_shared_layer_has_its_parameters_once_and_its_calls_each():
    conv = nn.Conv2d(4, 4, 1, bias=False)
    report = dysurgery.cost(nn.Sequential(conv, conv, conv), torch.randn(1, 4, 5, 5))
    assert report.params == 16
    assert report.mult_adds.total == 3 * 16 * 25
    assert [(site.path, site.mult_adds.total) for site in report.sites] == [("0", 3 * 16 * 25)]
