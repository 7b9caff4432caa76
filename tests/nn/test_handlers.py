import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dysurgery.nn import DynamicConv2d, refusal


class Flipped(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.flip(-1))


@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 3), Conv2dSame(3, 4, 3), nn.Linear(3, 4)])
def test_what_has_a_counterpart_is_not_refused(module):
    assert refusal(module) is None


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (weight_norm(nn.Conv2d(3, 4, 3)), "computed before each call"),
        (spectral_norm(nn.Conv2d(3, 4, 3)), "computed before each call"),
        (prune.random_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5), "computed before each call"),
        (parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "parametrized"),
        (Flipped(3, 4, 3), "no handler for"),
        (StdConv2d(3, 4, 3), "no handler for"),
        (ScaledStdConv2d(3, 4, 3), "no handler for"),
        (DynamicConv2d(3, 4, 3), "no handler for"),
        (nn.Conv1d(3, 4, 3), "no handler for torch.nn.modules.conv.Conv1d"),
        (nn.ConvTranspose2d(3, 4, 3), "no handler for torch.nn.modules.conv.ConvTranspose2d"),
        (nn.LazyConv2d(4, 3), "LazyConv2d"),
        (nn.Conv2d(3, 4, 3, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_computes_otherwise_is_refused_with_its_reason(module, words):
    assert words in refusal(module)
