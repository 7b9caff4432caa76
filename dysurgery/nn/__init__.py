"""The operator, which knows nothing of graphs: dynamic layers, their gate, bank, temperature and ways to run.

A static layer comes in through :mod:`handlers` (is there a counterpart?), :mod:`fold` (made plain if reparametrised)
and :meth:`DynamicLayer.from_static`, which fills a :mod:`bank` of K kernels and makes a gate (:mod:`attention`).
At run time the layer pools its input, asks the gate for pi, and :mod:`execution` chooses the way to convolve each
sample with its own mix. The way back: :meth:`DynamicLayer.to_static` is one layer with one kernel, and :mod:`norm` puts
a BatchNorm into the bank before it. What comes after a convolution it may do itself, if it is told (:mod:`links`).
"""

from dysurgery.nn.attention import GATES, Gate, SigmoidGate, SoftmaxGate
from dysurgery.nn.bank import STARTS
from dysurgery.nn.conv import (
    DynamicConv1d,
    DynamicConv2d,
    DynamicConv3d,
    DynamicConvTranspose1d,
    DynamicConvTranspose2d,
    DynamicConvTranspose3d,
)
from dysurgery.nn.copying import duplicate
from dysurgery.nn.epilogue import FusedActivation
from dysurgery.nn.fold import folded
from dysurgery.nn.handlers import HANDLERS, handler, refusal
from dysurgery.nn.layer import DynamicLayer
from dysurgery.nn.linear import DynamicLinear
from dysurgery.nn.norm import FusedNorm
from dysurgery.nn.temperature import TemperatureSchedule, set_temperature, temperature
from dysurgery.nn.timm_conv import (
    DynamicConv2dSame,
    DynamicScaledStdConv2d,
    DynamicScaledStdConv2dSame,
    DynamicStdConv2d,
    DynamicStdConv2dSame,
)

__all__ = [
    "GATES",
    "HANDLERS",
    "STARTS",
    "DynamicConv1d",
    "DynamicConv2d",
    "DynamicConv2dSame",
    "DynamicConv3d",
    "DynamicConvTranspose1d",
    "DynamicConvTranspose2d",
    "DynamicConvTranspose3d",
    "DynamicLayer",
    "DynamicLinear",
    "DynamicScaledStdConv2d",
    "DynamicScaledStdConv2dSame",
    "DynamicStdConv2d",
    "DynamicStdConv2dSame",
    "FusedActivation",
    "FusedNorm",
    "Gate",
    "SigmoidGate",
    "SoftmaxGate",
    "TemperatureSchedule",
    "duplicate",
    "folded",
    "handler",
    "refusal",
    "set_temperature",
    "temperature",
]
