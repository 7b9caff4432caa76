"""Turn a pretrained CNN into a dynamic-convolution network that computes exactly what it did.

The way of a model: :mod:`models` (a name becomes a model), :mod:`trace` (its convolutions), :mod:`select` (which of
them), :mod:`plan` (what would be done, at what cost), :mod:`choose` (what of it under a budget), :mod:`rewrite` (the
surgery, verified), :mod:`cost` (what it costs now), :mod:`train` (fine-tuning), :mod:`probe` (what the attention does),
:mod:`fuse` (BatchNorm into the banks) and :mod:`demote` (what need not be dynamic is static again) for inference,
:mod:`bench` (how fast it is), :mod:`autotune` (the fastest way of each layer on this machine), :mod:`checkpoint` (to
disk and back), :mod:`export` (to ONNX and torch.export), :mod:`hub` (to the Hugging Face hub), :mod:`page` (a report to
look at). The operator is in :mod:`nn`.
"""

from dysurgery._version import __version__
from dysurgery.autotune import autotune
from dysurgery.bench import bench
from dysurgery.calibrate import calibrate
from dysurgery.checkpoint import load, save
from dysurgery.choose import choose
from dysurgery.cost import cost
from dysurgery.demote import demote, freeze
from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.export import export
from dysurgery.fuse import fuse_bn
from dysurgery.hub import push_to_hub
from dysurgery.nn import DynamicConv2d, DynamicLinear, TemperatureSchedule, set_temperature, temperature
from dysurgery.page import report as report_page
from dysurgery.plan import plan
from dysurgery.probe import probe
from dysurgery.rewrite import convert

__all__ = [
    "DynamicConv2d",
    "DynamicLinear",
    "DysurgeryError",
    "TemperatureSchedule",
    "UsageError",
    "__version__",
    "autotune",
    "bench",
    "calibrate",
    "choose",
    "convert",
    "cost",
    "demote",
    "export",
    "freeze",
    "fuse_bn",
    "load",
    "plan",
    "probe",
    "push_to_hub",
    "report_page",
    "save",
    "set_temperature",
    "temperature",
]
