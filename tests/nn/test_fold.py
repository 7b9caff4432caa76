import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import dysurgery
from dysurgery.nn import DynamicConv2d, folded

REPARAMETRISED = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "pruned weight": lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
    "pruned twice": lambda conv: prune.random_structured(prune.l1_unstructured(conv, "weight", 0.3), "weight", 1, 0),
    "pruned bias": lambda conv: prune.random_unstructured(conv, "bias", 0.5),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "parametrized orthogonal": parametrizations.orthogonal,
}
X = torch.randn(2, 3, 12, 12, dtype=torch.float64)


@pytest.fixture(params=REPARAMETRISED)
def model(request):
    """Two plain convolutions and a reparametrised one between them, which has been called already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about the older ways
        conv = REPARAMETRISED[request.param](nn.Conv2d(4, 4, 3).double())
    model = nn.Sequential(nn.Conv2d(3, 4, 3).double(), conv, nn.ReLU(), nn.Conv2d(4, 2, 1).double())
    model(X)  # leaves a weight with its autograd graph in the module
    return model.eval()


def test_folding_keeps_the_function_and_leaves_the_original_as_it_was(model):
    expected, keys = model(X), list(model.state_dict())
    plain = folded(model[1])
    assert type(plain) is nn.Conv2d
    assert sorted(dict(plain.named_parameters())) == ["bias", "weight"]
    assert not plain._forward_pre_hooks
    torch.testing.assert_close(nn.Sequential(model[0], plain, *model[2:])(X), expected, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_without_consent_it_stays_static_with_the_reason(model):
    plan = dysurgery.plan(model, X)
    assert "fold" in next(p.decision.reason for p in plan.sites if p.site.path == "1")
    dynamic = dysurgery.convert(model, X)
    assert isinstance(dynamic[3], DynamicConv2d)
    torch.testing.assert_close(dynamic(X), model(X), rtol=1e-12, atol=1e-12)


def test_with_consent_it_becomes_dynamic_and_is_saved_and_loaded(model, tmp_path):
    plan = dysurgery.plan(model, X, fold=True)
    dynamic = dysurgery.convert(model, plan=plan)
    assert isinstance(dynamic[1], DynamicConv2d)
    torch.testing.assert_close(dynamic(X), model(X), rtol=1e-12, atol=1e-12)
    assert plan.params[1] == sum(p.numel() for p in dynamic.parameters())
    dysurgery.save(dynamic, tmp_path / "saved")
    torch.testing.assert_close(dysurgery.load(tmp_path / "saved", model=model)(X), dynamic(X))
    dynamic.train()(X).sum().backward()
    assert dynamic[1].bank.grad.abs().sum() > 0


def test_a_plain_module_is_returned_as_it_is():
    conv = nn.Conv2d(3, 4, 3)
    assert folded(conv) is conv


def test_a_model_that_keeps_what_it_computed_converts():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.seen = []

        def forward(self, x):
            self.last = self.first(x)
            self.seen = [self.last, self.second(self.last)]
            return self.seen[-1]

    model = Remembers().double()
    model(X)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    torch.testing.assert_close(dysurgery.convert(model, X)(X), model(X), rtol=1e-12, atol=1e-12)
