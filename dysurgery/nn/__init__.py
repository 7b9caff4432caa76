"""The operator, which knows nothing of graphs: dynamic layers, their gate, bank, temperature and ways to run.

A static layer comes in through :mod:`handlers` (is there a counterpart?) and :meth:`DynamicLayer.from_static`, which
fills a :mod:`bank` of K kernels and makes a gate (:mod:`attention`). At run time the layer pools its input, asks the
gate for pi, and :mod:`execution` chooses the way to convolve each sample with its own mix.
"""

from dysurgery.nn.attention import GATES, Gate, SigmoidGate, SoftmaxGate
from dysurgery.nn.bank import STARTS
from dysurgery.nn.conv import DynamicConv2d, DynamicConv2dSame
from dysurgery.nn.handlers import HANDLERS, refusal
from dysurgery.nn.layer import DynamicLayer
from dysurgery.nn.linear import DynamicLinear
from dysurgery.nn.temperature import TemperatureSchedule, set_temperature, temperature

__all__ = [
    "GATES",
    "HANDLERS",
    "STARTS",
    "DynamicConv2d",
    "DynamicConv2dSame",
    "DynamicLayer",
    "DynamicLinear",
    "Gate",
    "SigmoidGate",
    "SoftmaxGate",
    "TemperatureSchedule",
    "refusal",
    "set_temperature",
    "temperature",
]
