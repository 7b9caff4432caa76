import copy
import dataclasses
import warnings

import pytest
import timm
import torch
import torchvision
from torch import fx, nn
from torch.nn import functional as F

import dysurgery
from dysurgery import rewrite
from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.nn import HANDLERS, DynamicConv2d, DynamicLayer

IMAGE = torch.randn(1, 3, 64, 64)
TIMM = (
    "resnet18",
    "mobilenetv2_100",
    "mobilenetv3_small_050",
    "tf_efficientnet_b0",
    "densenet121",
    "convnext_atto",
    "regnety_002",
    "ghostnet_050",
    "mixnet_s",
    "repvgg_a0",
)
TORCHVISION = ("mnasnet0_5", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet")


def build(name, **options):
    """A network in which nothing is trivially zero or one."""
    torch.manual_seed(0)
    if name in TORCHVISION:
        extra = {"init_weights": True} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, **extra)
    else:
        model = timm.create_model(name, num_classes=10, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def dynamic_layers(model):
    return [module for module in model.modules() if isinstance(module, DynamicLayer)]


@pytest.mark.parametrize("name", TIMM + TORCHVISION)
def test_conversion_keeps_the_output_and_every_other_key(name):
    model = build(name).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    dynamic = dysurgery.convert(model, x[:1])
    assert dynamic_layers(dynamic)
    torch.testing.assert_close(dynamic(x), model(x), rtol=1e-9, atol=1e-9)
    assert type(dynamic) is type(model)
    replaced = {path for path, m in dynamic.named_modules() if isinstance(m, DynamicLayer)}
    kept = [key for key in model.state_dict() if key.rpartition(".")[0] not in replaced]
    inside = tuple(f"{path}." for path in replaced)
    assert [key for key in dynamic.state_dict() if not key.startswith(inside)] == kept
    assert all(torch.equal(dynamic.state_dict()[key], model.state_dict()[key]) for key in kept)


@pytest.mark.parametrize("options", [{"gate": "sigmoid"}, {"start": "zero-sum"}, {"linear": True, "layers": "all"}])
def test_every_start_and_gate_keeps_the_output(options):
    model = build("mobilenetv3_small_050").double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(dysurgery.convert(model, x, **options)(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_in_train_mode_with_dropout_and_drop_path_it_is_the_same_too(name):
    model = build(name, drop_rate=0.3, drop_path_rate=0.3).double()
    dynamic = dysurgery.convert(model, IMAGE.double())
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    outputs = []
    for network in (model.train(), dynamic.train()):
        torch.manual_seed(5)
        outputs.append(network(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-8)


def test_the_original_is_left_alone_and_the_copy_is_its_own():
    model = build("resnet18").train()
    model.layer1.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    dynamic = dysurgery.convert(model, IMAGE)
    assert model.training
    assert dynamic.training
    with torch.no_grad():
        for parameter in dynamic.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not dynamic_layers(model)
    assert not any(p.requires_grad for p in dynamic.layer1.parameters())


def test_methods_attributes_and_hooks_survive():
    model, image = build("mobilenetv2_100").double(), IMAGE.double()
    model.note = "mine"
    model.blocks[1][0].conv_dw.tag = 7
    calls = []
    model.blocks[1][0].conv_dw.register_forward_hook(lambda m, i, o: calls.append(type(m).__name__))
    dynamic = dysurgery.convert(model, image)
    calls.clear()
    features = dynamic.forward_features(image)
    assert calls == ["DynamicConv2d"]
    torch.testing.assert_close(features, model.forward_features(image))
    assert dynamic.note == "mine"
    assert dynamic.blocks[1][0].conv_dw.tag == 7
    assert dynamic.pretrained_cfg == model.pretrained_cfg
    dynamic.reset_classifier(3)
    assert dynamic(image).shape == (1, 3)


def test_shared_modules_are_replaced_under_every_name():
    model = build("coat_lite_tiny", img_size=64).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    dynamic = dysurgery.convert(model, x)
    torch.testing.assert_close(dynamic(x), model(x))
    shared = dynamic.crpe1.conv_list[0]
    assert isinstance(shared, DynamicLayer)
    assert dynamic.serial_blocks1[0].factoratt_crpe.crpe.conv_list[0] is shared
    assert not any(isinstance(m, nn.Conv2d) for p, m in dynamic.named_modules() if p != "patch_embed1.proj")


def test_a_second_conversion_is_a_no_op_that_says_so():
    dynamic = dysurgery.convert(build("resnet18"), IMAGE)
    with pytest.warns(UserWarning, match="nothing to convert in ResNet: 19 already dynamic, 1 first convolution"):
        again = dysurgery.convert(dynamic, IMAGE)
    assert list(again.state_dict()) == list(dynamic.state_dict())
    torch.testing.assert_close(again(IMAGE), dynamic(IMAGE), rtol=0, atol=0)


def test_a_conversion_can_be_extended():
    part = dysurgery.convert(build("resnet18"), IMAGE, include="layer4")
    whole = dysurgery.convert(part, IMAGE)
    assert len(dynamic_layers(whole)) == 19
    torch.testing.assert_close(whole(IMAGE), part(IMAGE), rtol=1e-4, atol=1e-5)


def test_in_place_changes_the_model_itself():
    model = build("resnet18")
    expected = model(IMAGE)
    assert dysurgery.convert(model, IMAGE, in_place=True) is model
    assert len(dynamic_layers(model)) == 19
    torch.testing.assert_close(model(IMAGE), expected, rtol=1e-4, atol=1e-5)


def test_a_plan_for_another_model_is_refused():
    plan = dysurgery.plan(build("resnet18"), IMAGE)
    for other in (build("mobilenetv2_100"), timm.create_model("resnet26")):
        with pytest.raises(UsageError, match="another model"):
            dysurgery.convert(other, plan=plan)


class Wrong(DynamicConv2d):
    def forward(self, x):
        return super().forward(x) * 1.01


@pytest.mark.parametrize("in_place", [True, False])
def test_a_result_that_computes_something_else_is_an_error_and_the_model_stays(monkeypatch, in_place):
    monkeypatch.setitem(HANDLERS, nn.Conv2d, Wrong)
    model = build("resnet18")
    expected = model(IMAGE)
    with pytest.raises(DysurgeryError, match="computes something else"):
        dysurgery.convert(model, IMAGE, in_place=in_place)
    assert not dynamic_layers(model)
    torch.testing.assert_close(model(IMAGE), expected, rtol=0, atol=0)


class Chooses(nn.Module):
    """Returns where its largest responses are, like a detector; which they are is a matter of rounding."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3)

    def forward(self, x):
        score = torch.sin(1e6 * self.conv(self.stem(x)))
        return score.flatten(1).topk(20).indices.float()


@pytest.mark.parametrize("in_place", [True, False])
def test_an_output_that_rounding_decides_is_verified_layer_by_layer(monkeypatch, in_place):
    model = Chooses()
    plan = dysurgery.plan(model, IMAGE)
    done = rewrite.carry_out(plan, copy.deepcopy(model), in_place=in_place)
    assert isinstance(done.model.conv, DynamicConv2d)
    assert done.relative_diff > 1e-3
    assert done.rounding > 1e-3
    monkeypatch.setitem(HANDLERS, nn.Conv2d, Wrong)
    with pytest.raises(DysurgeryError, match="computes something else"):
        rewrite.carry_out(plan, model, in_place=in_place)
    assert not dynamic_layers(model)


@pytest.mark.parametrize("in_place", [True, False])
def test_where_a_sample_of_rounding_explains_too_little_float64_decides(monkeypatch, in_place):
    monkeypatch.setattr(rewrite, "rounded", lambda model, paths, inputs: rewrite.outputs(model, inputs)[0])
    model = Chooses()
    plan = dysurgery.plan(model, IMAGE)
    done = rewrite.carry_out(plan, copy.deepcopy(model), in_place=in_place)
    assert done.relative_diff > 1e-3
    assert done.rounding == done.relative_diff
    assert {p.dtype for p in done.model.parameters()} == {torch.float32}
    assert done.model.conv.bank.requires_grad
    monkeypatch.setattr(rewrite, "in_float64", lambda model, inputs: None)  # it does not run in that type
    with pytest.raises(DysurgeryError, match="computes something else"):
        rewrite.carry_out(plan, model, in_place=in_place)


def test_a_reference_that_in_place_cannot_reach_is_an_error_and_a_copy_reaches_it():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.later = [self.conv]

        def forward(self, x):
            return self.later[0](self.stem(x))

    model = Listed().eval()
    with pytest.raises(DysurgeryError, match="never called"):
        dysurgery.convert(model, IMAGE, in_place=True)
    assert not dynamic_layers(model)
    dynamic = dysurgery.convert(model, IMAGE)
    assert dynamic.later[0] is dynamic.conv


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: dict


class Custom(nn.Module):
    """Two inputs, an optional one, a dataclass with a dict in it, an autocast region, a buffer that counts."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3)
        self.mix = nn.Conv2d(8, 8, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, image, depth, *, scale=None):
        self.seen += 1
        with torch.autocast("cpu", enabled=False):
            x = self.mix(torch.relu(self.a(image) + self.b(depth)))
        return Output(x.mean((2, 3)) * (scale or 1), {"map": x})


def test_several_inputs_optional_ones_and_structured_outputs():
    model = Custom().eval()
    example = {"image": torch.randn(2, 3, 8, 8), "depth": torch.randn(2, 1, 8, 8)}
    conversion = rewrite.carry_out(dysurgery.plan(model, example), model)
    assert conversion.relative_diff < 1e-5
    assert model.seen == 0
    assert conversion.model.seen == 0
    out = conversion.model(**example, scale=2)
    torch.testing.assert_close(out.logits, model(**example, scale=2).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_channels_last(dtype):
    model = build("mobilenetv3_small_050").to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
    conversion = rewrite.carry_out(dysurgery.plan(model, x), model)
    assert {p.dtype for p in conversion.model.parameters()} == {dtype}
    torch.testing.assert_close(conversion.model(x), model(x), rtol=0.1, atol=0.1)


def test_a_convolution_alone_and_a_model_without_any():
    conv = nn.Conv2d(3, 4, 3)
    dynamic = dysurgery.convert(conv, IMAGE, layers="all")
    assert isinstance(dynamic, DynamicConv2d)
    torch.testing.assert_close(dynamic(IMAGE), conv(IMAGE))
    with pytest.raises(UsageError, match="in place"):
        dysurgery.convert(conv, IMAGE, layers="all", in_place=True)
    with pytest.raises(UsageError, match="nothing is selected in Conv2d: 1 first convolution"):
        dysurgery.convert(conv, IMAGE)
    with pytest.raises(UsageError, match="it has no convolution"):
        dysurgery.convert(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)), IMAGE)
    with pytest.raises(UsageError, match="needs an example"):
        dysurgery.convert(conv)


def test_a_detector_with_lists_in_and_dicts_out_is_converted_where_asked():
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    example = ([torch.rand(3, 320, 320)],)
    dynamic = dysurgery.convert(model, example, include=r"^backbone\.")
    paths = [path for path, m in dynamic.named_modules() if isinstance(m, DynamicLayer)]
    assert paths
    assert all(path.startswith("backbone.") for path in paths)
    torch.testing.assert_close(dynamic(*example)[0]["scores"], model(*example)[0]["scores"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_network_and_leaves_the_random_state_alone(seed):
    model = build("resnet18")
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    first, second = (dysurgery.convert(model, IMAGE, seed=seed).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = dysurgery.convert(model, IMAGE, seed=seed + 10).state_dict()
    assert not torch.equal(first["layer1.0.conv1.gate.fc1.weight"], other["layer1.0.conv1.gate.fc1.weight"])


def test_one_training_step_moves_every_bank_and_after_two_every_attention():
    dynamic = dysurgery.convert(build("mobilenetv3_small_050").train(), IMAGE)
    before = copy.deepcopy(dynamic)
    opt = torch.optim.SGD(dynamic.parameters(), lr=0.1)
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 64, 64), torch.randint(0, 10, (8,))
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(dynamic(x), y).backward()
        assert all(p.grad.isfinite().all() for p in dynamic.parameters() if p.grad is not None)
        opt.step()
    for old, new in zip(dynamic_layers(before), dynamic_layers(dynamic), strict=True):
        assert not torch.equal(old.bank, new.bank)
        assert not torch.equal(old.gate.fc2.bias, new.gate.fc2.bias)


def test_a_converted_network_compiles_without_a_graph_break():
    torch._dynamo.reset()
    dynamic = dysurgery.convert(build("mobilenetv3_small_050"), IMAGE)
    compiled = torch.compile(dynamic, backend="eager", fullgraph=True)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 64, 64)
        torch.testing.assert_close(compiled(x), dynamic(x))


class Functional(nn.Module):
    """A functional convolution, a block that is called twice, dropout by flag, an optional argument."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.dropout(self.norm(self.conv(x)), 0.3, self.training)

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3), self.Block()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 4, 3, 3) * 0.1), nn.Parameter(torch.randn(8))
        self.drop = 0.5

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        x = self.block(self.block(self.stem(x)))
        x = F.conv2d(x, self.weight, self.bias, stride=2, padding=1, groups=2)
        return F.dropout(x.mean((2, 3)), self.drop if self.training else 0.0)


def test_a_graph_reaches_functional_convolutions_and_single_calls_in_train_and_eval():
    model = Functional().double().eval()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    plan = dysurgery.plan(model, x, as_graph=True)
    assert [site.path for site in plan.chosen] == ["block.conv_call1", "block.conv_call2", "conv2d"]
    graph = dysurgery.convert(model, plan=plan)
    assert isinstance(graph, fx.GraphModule)
    assert graph.block.conv_call1.bank is not graph.block.conv_call2.bank
    assert dysurgery.cost(graph, x).params == plan.params[1]
    assert dysurgery.cost(graph, x).mult_adds == plan.mult_adds[1]
    for network in (copy.deepcopy(graph), graph):
        reference = copy.deepcopy(model)
        for mode in (True, False, True):
            outputs = []
            for each in (reference, network):
                torch.manual_seed(5)
                outputs.append(each.train(mode)(x))
            torch.testing.assert_close(outputs[1], outputs[0])


def test_one_call_of_a_shared_module_can_be_chosen_alone():
    model = Functional().eval()
    graph = dysurgery.convert(model, IMAGE, as_graph=True, include="conv_call2")
    assert isinstance(graph.block.conv, nn.Conv2d)
    assert isinstance(graph.block.conv_call2, DynamicConv2d)
    torch.testing.assert_close(graph(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "regnety_002", "convnext_atto"])
def test_graphs_of_timm_models_are_right_in_train_and_eval(name):
    model = build(name, drop_rate=0.3, drop_path_rate=0.2).double()
    graph = dysurgery.convert(model, IMAGE.double(), as_graph=True)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for mode in (False, True):
        outputs = []
        for network in (copy.deepcopy(model), graph):
            torch.manual_seed(5)
            outputs.append(network.train(mode)(x))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-8)


def test_a_model_that_trains_another_way_than_it_predicts_is_no_graph():
    class Auxiliary(Functional):
        def forward(self, x):
            y = super().forward(x)
            return (y, y + 1) if self.training else y

    with pytest.raises(DysurgeryError, match="without as_graph"):
        dysurgery.convert(Auxiliary().eval(), IMAGE, as_graph=True)
    with pytest.raises(UsageError, match="exclude each other"):
        dysurgery.convert(Functional(), IMAGE, as_graph=True, in_place=True)


def test_only_the_functional_convolution_needs_the_graph():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dynamic = dysurgery.convert(Functional().eval(), IMAGE)
    assert type(dynamic) is Functional
    assert len(dynamic_layers(dynamic)) == 1
