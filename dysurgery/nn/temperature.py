"""The softmax temperature tau and its warmup.

tau lives in every gate as a buffer, so it is saved, moved and compiled with the model. Training sets it from a
:class:`TemperatureSchedule`, a pure function of progress: a resumed run cannot lose it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dysurgery.errors import UsageError, did_you_mean
from dysurgery.nn.attention import Gate

# How far bfloat16 may round one tau from what a float32 gate beside it holds.
ROUNDING = 2**-8

# Each shape maps (start, end, fraction of the warmup in 0..1) to tau.
SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, t: start + (end - start) * t,
    "cosine": lambda start, end, t: end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * t)),
    "exponential": lambda start, end, t: start * (end / start) ** t,
}


@dataclass(frozen=True)
class TemperatureSchedule:
    """tau as a function of training progress, by default the paper's: 30 to 1, linearly, over 10 epochs.

    Args:
        start: tau at progress 0.
        end: tau from ``warmup`` on.
        warmup: length of the warmup, in the unit of progress (epochs; fractions are fine). 0 means none.
        shape: one of :data:`SHAPES`.

    Raises:
        UsageError: for a temperature that is not positive, a negative warmup or an unknown shape.

    Source: Chen et al., CVPR 2020, temperature annealing.
    """

    start: float = 30.0
    end: float = 1.0
    warmup: float = 10.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise UsageError(f"a temperature is positive and finite, got start={self.start}, end={self.end}")
        if not 0 <= self.warmup < math.inf:
            raise UsageError(f"the temperature warmup is at least 0 epochs, got {self.warmup}")
        if self.shape not in SHAPES:
            raise UsageError(
                f"unknown temperature shape {self.shape!r}: expected one of {', '.join(SHAPES)}"
                f"{did_you_mean(self.shape, SHAPES)}"
            )

    def __call__(self, progress: float) -> float:
        """Return tau at ``progress`` (epochs done, 0 at the first step)."""
        if progress >= self.warmup:
            return self.end
        return SHAPES[self.shape](self.start, self.end, max(progress, 0.0) / self.warmup)


def set_temperature(model: nn.Module, tau: float) -> None:
    """Set tau in every gate of ``model``, in place.

    Raises:
        UsageError: if tau is not positive and finite, or the model has no dynamic layer.
    """
    if not 0 < tau < math.inf:
        raise UsageError(f"a temperature is positive and finite, got {tau}")
    for gate in _gates(model):
        gate.tau.fill_(tau)


def temperature(model: nn.Module) -> float:
    """Return the tau of ``model``.

    Raises:
        UsageError: if the model has no dynamic layer, or its gates disagree.
    """
    taus = [float(gate.tau.item()) for gate in _gates(model)]
    if max(taus) > (1 + ROUNDING) * min(taus):
        raise UsageError(f"the gates disagree about tau ({min(taus):g} to {max(taus):g}): call set_temperature")
    return taus[0]


def _gates(model: nn.Module) -> list[Gate]:
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    if not gates:
        raise UsageError("the model has no dynamic layer: convert it first (dysurgery.convert)")
    return gates
