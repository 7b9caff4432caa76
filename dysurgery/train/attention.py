"""Is the attention alive: the entropy of pi and its spread over images, of every gate."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dysurgery.demote import attention_on
from dysurgery.nn import DynamicLayer


@dataclass(frozen=True)
class AttentionStatistics:
    """How the weights pi of one layer vary.

    Attributes:
        path: of the layer.
        entropy: mean over images of the entropy of pi, divided by log K: 1 is uniform, 0 is one kernel alone.
        spread: standard deviation of pi over images, averaged over the K kernels: 0 is a dead attention.
    """

    path: str
    entropy: float
    spread: float


def attention_statistics(model: nn.Module, batches: Iterable[Tensor]) -> tuple[AttentionStatistics, ...]:
    """Run ``batches`` (B, C, H, W) through ``model`` and return how each gate with K > 1 that they reach behaves.

    The weights of a sigmoid gate are divided by their sum for the entropy.
    """
    layers = {p: m for p, m in model.named_modules() if isinstance(m, DynamicLayer) and m.k > 1}
    if not layers:
        return ()
    found = []
    for path, pi in attention_on(model, batches).items():
        if path in layers:
            found.append(AttentionStatistics(path, *entropy_and_spread(pi)))
    return tuple(found)


def entropy_and_spread(pi: Tensor) -> tuple[float, float]:
    """Return both figures of :class:`AttentionStatistics` for the weights pi (N, K) of N images, K > 1."""
    share = pi / pi.sum(dim=1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(dim=1).mean() / math.log(pi.shape[1])
    return float(entropy), float(pi.std(dim=0, correction=0).mean())
