import json

import pytest
import timm
import torch
from tiny import Net, image_data, net
from torch import nn

import dysurgery
from dysurgery.choose import LEFT, added, choose
from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.planfile import edited, surgery
from dysurgery.score import by_gradients
from dysurgery.train import finetune, load_recipe

IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(24) % 5


class Custom(nn.Module):
    """A stem, BatchNorm, an activation in place, groups, a shared layer, a transposed one, a Linear on tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.shared = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.tokens = nn.Linear(4, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.relu(self.depthwise(x), inplace=True)
        x = self.up(torch.relu(self.shared(self.shared(x))))
        return self.head(torch.relu(self.tokens(x.flatten(2).transpose(1, 2))).mean(1))


def custom():
    torch.manual_seed(3)
    return Custom().eval()


@pytest.fixture(scope="module")
def timm_model():
    torch.manual_seed(0)
    return timm.create_model("mobilenetv3_small_050", num_classes=5).eval()


def with_timm(model, **options):
    return model, dysurgery.plan(model, IMAGES[:1], **options)


def with_custom(**options):
    model = custom()
    return model, dysurgery.plan(model, IMAGES[:1], linear=True, **options)


def within(plan, share):
    """Return what the network may have if ``share`` of what the plan adds is allowed: parameters and Mult-Adds."""
    before, after = plan.params, [entry.total for entry in plan.mult_adds]
    return before[0] + int((before[1] - before[0]) * share), after[0] + int((after[1] - after[0]) * share)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("which", ["timm", "custom"])
def test_the_converted_network_is_within_both_budgets(timm_model, which, k):
    model, wide = with_timm(timm_model, k=k) if which == "timm" else with_custom(k=k)
    scores = []
    for share in (0.15, 0.5, 0.8, 1.0):
        params, mult_adds = within(wide, share)
        choice = choose(model, wide, (IMAGES[:8], CLASSES[:8]), budget_params=params, budget_mult_adds=mult_adds)
        converted = dysurgery.convert(model, plan=choice.plan)
        cost = dysurgery.cost(converted, IMAGES[:1])
        assert cost.params <= params
        assert cost.mult_adds.total <= mult_adds
        assert (cost.params, cost.mult_adds) == (choice.plan.params[1], choice.plan.mult_adds[1])
        layers = [module for module in converted.modules() if isinstance(module, dysurgery.nn.DynamicLayer)]
        assert {layer.k for layer in layers} == {k}
        assert len(layers) == len(choice.plan.chosen)
        scores.append(choice.kept)
    assert scores == sorted(scores)
    assert scores[-1] == pytest.approx(1)


def test_the_order_of_the_images_and_their_batches_do_not_matter():
    model, wide = with_custom()
    order = torch.randperm(24)
    one = choose(model, wide, (IMAGES, CLASSES), budget_params="2x")
    other = choose(model, wide, (IMAGES[order], CLASSES[order]), budget_params="2x")
    batches = [(IMAGES[some], CLASSES[some]) for some in order.split(7)]
    assert one.scores == other.scores == choose(model, wide, batches, budget_params="2x").scores
    assert one.plan == other.plan == choose(model, wide, (IMAGES, CLASSES), budget_params="2x").plan
    small = choose(model, wide, (IMAGES, CLASSES), budget_params="2x", batch_size=5)
    assert small.scores == pytest.approx(one.scores, rel=1e-4)


def test_the_score_is_the_deviation_of_single_gradients():
    model, wide = with_custom()
    found = by_gradients(model, wide.chosen, [(IMAGES, CLASSES)])
    for path in ("depthwise", "up"):
        weight, grads = model.get_submodule(path).weight, []
        for image, number in zip(IMAGES, CLASSES, strict=True):
            loss = nn.functional.cross_entropy(model(image[None]), number[None])
            grads.append(torch.autograd.grad(loss, weight)[0].flatten())
        expected = weight.norm() * torch.stack(grads).var(dim=0).sum().sqrt()
        assert found[path] == pytest.approx(expected.item(), rel=1e-3)


def test_a_factor_that_batchnorm_takes_out_changes_no_score():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).eval()  # fmt: skip
    sites = dysurgery.plan(model, IMAGES[:1]).chosen
    before = by_gradients(model, sites, [(IMAGES, CLASSES)])
    with torch.no_grad():
        model[3].weight.mul_(5)
        model[4].running_var.mul_(25)
        model[4].eps *= 25
    assert by_gradients(model, sites, [(IMAGES, CLASSES)]) == pytest.approx(before, rel=1e-3)


def test_the_network_stays_as_it_was(timm_model):
    timm_model.train()
    state = {key: value.clone() for key, value in timm_model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in timm_model.parameters()]
    random = torch.get_rng_state()
    model, wide = with_timm(timm_model)
    choose(model, wide, IMAGES[:4])
    assert all(torch.equal(state[key], value) for key, value in timm_model.state_dict().items())
    assert [parameter.requires_grad for parameter in timm_model.parameters()] == grads
    assert all(parameter.grad is None for parameter in timm_model.parameters())
    assert not any(module._forward_hooks for module in timm_model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert timm_model.training
    timm_model.eval()


def test_frozen_networks_have_scores_too():
    model, wide = with_custom()
    free = choose(model, wide, IMAGES).scores
    model.requires_grad_(False)
    assert choose(model, wide, IMAGES).scores == pytest.approx(free, rel=1e-4)


def test_labels_are_used_if_they_are_those_of_the_network():
    data, model = image_data(), net()
    assert choose(model, dysurgery.plan(model, torch.zeros(1, 3, 8, 8)), data).by == "labels"
    assert choose(model, dysurgery.plan(model, torch.zeros(1, 3, 8, 8)), data, labels=False).by == "predictions"
    wider = Net(classes=7).eval()
    choice = choose(wider, dysurgery.plan(wider, torch.zeros(1, 3, 8, 8)), data, images=10)
    assert (choice.by, choice.images) == ("predictions", 10)


def test_without_data_a_rule_of_shape_decides():
    model, wide = with_custom()
    choice = choose(model, wide, budget_params="1.6x")
    assert (choice.by, choice.images) == ("shape", 0)
    assert 0 < len(choice.plan.chosen) < len(wide.chosen)
    assert sum(choice.scores.values()) == pytest.approx(1)
    assert {p.decision.reason for p in choice.plan.sites if not p.decision.dynamic} >= {LEFT}


def test_without_a_budget_the_plan_stays_and_gets_scores():
    model, wide = with_custom()
    choice = choose(model, wide, IMAGES)
    assert choice.plan == wide
    assert set(choice.scores) == {site.path for site in wide.chosen}


def test_the_plan_is_read_back_from_its_file():
    model, wide = with_custom(k=3)
    choice = choose(model, wide, IMAGES, budget_params="2x")
    again = edited(model, IMAGES[:1], json.loads(json.dumps(choice.to_json())))
    assert [site.path for site in again.chosen] == [site.path for site in choice.plan.chosen]
    assert (again.params, again.mult_adds, again.settings) == (
        choice.plan.params, choice.plan.mult_adds, choice.plan.settings,
    )  # fmt: skip


def test_a_recipe_converts_what_the_plan_says():
    model = net()
    wide = dysurgery.plan(model, torch.zeros(1, 3, 8, 8), k=3, layers="all")
    cheapest = min(added(planned)[0] for planned in wide.sites)
    choice = choose(model, wide, image_data(), budget_params=wide.params[0] + cheapest)
    overrides = {f"surgery.{key}": value for key, value in surgery(choice.to_json()).items()}
    more = {"finetune.epochs": 1, "finetune.batch_size": 16, "finetune.workers": 0}
    outcome = finetune(model, image_data(), load_recipe("folder", overrides | more), control=False)
    dynamic = {p: m for p, m in outcome.model.named_modules() if isinstance(m, dysurgery.nn.DynamicLayer)}
    assert list(dynamic) == [site.path for site in choice.plan.chosen] == ["conv1"]
    assert dynamic["conv1"].k == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget_params": "1.0001x"}, "holds no site: one of at most .* the cheapest, tokens, adds"),
        ({"budget_mult_adds": 1}, "conversion only adds"),
        ({"images": 1}, "at least 2"),
        ({"data": (IMAGES, CLASSES + 5)}, "--no-labels"),
        ({"data": (IMAGES, CLASSES[:3])}, "24 images cannot have 3"),
        ({"data": IMAGES[:1]}, "at least two"),
        ({"data": 3}, "no data"),
        ({"data": [{"x": 1}]}, "a batch is images"),
        ({"data": "nowhere"}, "no data 'nowhere'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(options, words):
    model, wide = with_custom()
    with pytest.raises(UsageError, match=words):
        choose(model, wide, **options)


def test_images_that_are_all_the_same_choose_nothing():
    model = net()
    with pytest.raises(UsageError, match="score above 0"):
        choose(model, dysurgery.plan(model, torch.zeros(1, 3, 8, 8)), torch.ones(4, 3, 8, 8))


def test_a_plan_without_sites_or_of_calls_is_refused():
    model = custom()
    with pytest.raises(UsageError, match="nothing to choose from"):
        choose(model, dysurgery.plan(model, IMAGES[:1], exclude="."), budget_params="2x")
    with pytest.raises(UsageError, match="as_graph"):
        choose(model, dysurgery.plan(model, IMAGES[:1], as_graph=True), budget_params="2x")


def test_what_is_no_classifier_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    wide = dysurgery.plan(model, IMAGES[:1])
    with pytest.raises(DysurgeryError, match=r"no classifier.*by their shape"):
        choose(model, wide, IMAGES)
    assert choose(model, wide, budget_params="3x").plan.chosen
