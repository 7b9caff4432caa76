import json

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import dysurgery
from dysurgery.errors import UsageError
from dysurgery.planfile import edited, to_json

IMAGE = torch.randn(1, 3, 64, 64)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("mobilenetv3_small_050", num_classes=10).eval()


def test_the_json_has_totals_and_every_site(model):
    data = json.loads(json.dumps(to_json(dysurgery.plan(model, IMAGE))))
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
    again = edited(model, IMAGE, json.loads(json.dumps(to_json(plan))))
    assert to_json(again) == to_json(plan)


def test_an_edited_decision_is_followed_and_said(model):
    data = to_json(dysurgery.plan(model, IMAGE))
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
    data = to_json(dysurgery.plan(model, IMAGE))
    with pytest.raises(UsageError, match=words):
        edited(model, IMAGE, spoil(data))


def test_a_plan_cannot_make_dynamic_what_has_no_handler():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), weight_norm(nn.Conv2d(4, 4, 3)))
    data = to_json(dysurgery.plan(net, IMAGE))
    data["sites"][-1]["decision"] = "dynamic"
    with pytest.raises(UsageError, match="fold=True"):
        edited(net, IMAGE, data)
