import json

import pytest
import timm
import torch
from torch import nn

import dysurgery
from dysurgery.errors import UsageError
from dysurgery.plan import edited

IMAGE = torch.randn(1, 3, 64, 64)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("mobilenetv3_small_050", num_classes=10).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 2, "reduction": 8},
        {"gate": "sigmoid"},
        {"layers": "all", "linear": True},
        {"kinds": "pointwise", "exclude": "se"},
    ],
)
def test_the_prediction_is_what_the_conversion_then_costs(model, options):
    plan = dysurgery.plan(model, IMAGE, **options)
    before, after = (dysurgery.cost(m, IMAGE) for m in (model, dysurgery.convert(model, plan=plan)))
    assert plan.params == (before.params, after.params)
    assert plan.mult_adds == (before.mult_adds, after.mult_adds)
    counted = {site.path: (site.params, site.mult_adds) for site in after.sites}
    for planned in plan.sites:
        if planned.site.kind != "linear":
            assert counted[planned.site.path] == (planned.params[1], planned.mult_adds[1])


def test_planning_touches_nothing(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dysurgery.plan(model, IMAGE)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_json_has_totals_and_every_site(model):
    data = json.loads(json.dumps(dysurgery.plan(model, IMAGE).to_json()))
    assert (
        data["params"]["static"] + sum(s["params"]["dynamic"] - s["params"]["static"] for s in data["sites"])
        == (data["params"]["dynamic"])
    )
    parts = sum(data["mult_adds"][part] for part in ("static", "pooling", "attention", "aggregation"))
    assert parts == data["mult_adds"]["dynamic"]
    assert len(data["sites"]) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert {site["decision"] for site in data["sites"]} == {"static", "dynamic"}


def test_an_unedited_plan_reads_back_as_it_was(model):
    plan = dysurgery.plan(model, IMAGE, k=8, include=("conv_pw", "conv_dw"), exclude="blocks.0")
    again = edited(model, IMAGE, json.loads(json.dumps(plan.to_json())))
    assert again.to_json() == plan.to_json()


def test_an_edited_decision_is_followed_and_said(model):
    data = dysurgery.plan(model, IMAGE).to_json()
    data["k"] = 3
    for site in data["sites"]:
        site["decision"] = "dynamic" if site["path"] in ("conv_stem", "blocks.0.0.se.conv_reduce") else "static"
    plan = edited(model, IMAGE, data)
    assert [site.path for site in plan.chosen] == ["conv_stem", "blocks.0.0.se.conv_reduce"]
    assert {p.decision.reason for p in plan.sites if p.decision.dynamic} == {"set in the plan"}
    assert dysurgery.convert(model, plan=plan).conv_stem.k == 3


def spoiled(data, **changes):
    return {**data, **changes}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: {}, "sites"),
        (lambda d: spoiled(d, sites=3), "not a plan"),
        (lambda d: spoiled(d, sites=[1]), "not a plan"),
        (lambda d: spoiled(d, sites=[{"path": "conv_stem"}]), "decision"),
        (lambda d: spoiled(d, sites=[{"path": "conv_stem", "decision": "maybe"}]), "'maybe'"),
        (lambda d: spoiled(d, sites=[{"path": "conv_stm", "decision": "dynamic"}]), "did you mean 'conv_stem'"),
        (lambda d: spoiled(d, k="four"), "k"),
        (lambda d: spoiled(d, k=1), "k is at least 2"),
        (lambda d: spoiled(d, spread=None), "spread"),
        (lambda d: spoiled(d, layers="some"), "some"),
        (lambda d: spoiled(d, include=[1]), "include"),
        (lambda d: spoiled(d, gate=["softmax"]), "gate"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_in_one_sentence(model, spoil, words):
    data = dysurgery.plan(model, IMAGE).to_json()
    with pytest.raises(UsageError, match=words):
        edited(model, IMAGE, spoil(data))


def test_a_plan_cannot_make_dynamic_what_has_no_handler():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3))
    data = dysurgery.plan(net, IMAGE).to_json()
    data["sites"][-1]["decision"] = "dynamic"
    with pytest.raises(UsageError, match="no handler for"):
        edited(net, IMAGE, data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 1}, "at least 2"),
        ({"reduction": 0}, "reduction"),
        ({"spread": 0.0}, "spread"),
        ({"spread": float("nan")}, "spread"),
        ({"gate": "sofmax"}, "softmax"),
        ({"start": "copy"}, "copies"),
        ({"gate": "sigmoid", "start": "copies"}, "zero-sum"),
    ],
)
def test_settings_out_of_range_are_refused(model, options, words):
    with pytest.raises(UsageError, match=words):
        dysurgery.plan(model, IMAGE, **options)
