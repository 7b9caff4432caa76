import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dysurgery.nn import DynamicConv2d, handler, refusal


class Flipped(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.flip(-1))


class OwnConstructor(nn.Conv2d):
    """What many people subclass for: it computes what Conv2d does."""

    def __init__(self, width):
        super().__init__(width, width, 3, padding="same", bias=False)

    def describe(self):
        return f"{self.in_channels} wide"


def wrapped(module):
    """As offloading libraries do it: a new forward on the instance, around the old one."""
    inner = module.forward
    module.forward = lambda x: inner(2 * x)
    return module


def conv():
    return nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        Conv2dSame(4, 4, 3),
        StdConv2d(4, 4, 3),
        ScaledStdConv2d(4, 4, 3),
        nn.Conv1d(4, 4, 3),
        nn.ConvTranspose3d(4, 4, 3),
        nn.Linear(4, 4),
        OwnConstructor(4),
    ],
)
def test_what_has_a_counterpart_is_not_refused(module):
    assert refusal(module) is None
    assert refusal(module.requires_grad_(False).half()) is None
    assert handler(module).from_static(module, k=2).replaces in type(module).__mro__


COMPUTES_OTHERWISE = {
    "weight_norm": (lambda: weight_norm(conv()), "fold=True"),
    "spectral_norm": (lambda: spectral_norm(conv()), "computed before each call"),
    "pruned weight": (lambda: prune.random_unstructured(conv(), "weight", 0.5), "computed before each call"),
    "pruned bias": (lambda: prune.random_unstructured(conv(), "bias", 0.5), "computed before each call"),
    "parametrized weight_norm": (lambda: parametrizations.weight_norm(conv()), "fold=True"),
    "parametrized spectral_norm": (lambda: parametrizations.spectral_norm(conv()), "fold=True"),
    "forward of its own": (lambda: wrapped(conv()), "its forward was replaced on the instance"),
    "subclass": (lambda: Flipped(3, 4, 3), "Flipped"),
    "dynamic already": (lambda: DynamicConv2d(3, 4, 3), "no handler for dysurgery"),
    "LazyConv2d": (lambda: nn.LazyConv2d(4, 3), "run the model once"),
    "complex": (lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex64), "complex64"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", COMPUTES_OTHERWISE)
def test_what_computes_otherwise_is_refused_with_its_reason(case):
    make, words = COMPUTES_OTHERWISE[case]
    assert words in refusal(make())
