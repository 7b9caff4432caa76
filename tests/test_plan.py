import pytest
import timm
import torch

import dysurgery
from dysurgery.errors import UsageError

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
