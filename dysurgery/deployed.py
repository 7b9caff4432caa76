"""How long a network takes in torch and as an exported file, beside a static one of the same architecture.

The static counterpart is the network with every dynamic layer frozen to its mean kernel, exported in the same way. All
are measured in turns (:mod:`dysurgery.latency`), on the CPU, with as many threads as torch has.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dysurgery.demote import freeze
from dysurgery.errors import UsageError
from dysurgery.export import Exported, export, on_cpu
from dysurgery.formats import FORMATS
from dysurgery.latency import latency
from dysurgery.nn import DynamicLayer
from dysurgery.verify import tolerance

IMAGES = (1, 8)


@dataclass(frozen=True)
class Timing:
    """One measurement.

    Attributes:
        network: ``dynamic`` or ``static``.
        runtime: what ran it: ``torch``, ``onnxruntime`` or ``torch.export``.
        images: that went in at once.
        milliseconds: the median.
    """

    network: str
    runtime: str
    images: int
    milliseconds: float


def timings(
    model: nn.Module,
    input_size: tuple[int, ...],
    exported: Exported,
    *,
    images: Sequence[int] = IMAGES,
    seconds: float = 2.0,
) -> tuple[Timing, ...]:
    """Measure ``model`` in torch and its exported file, and the static counterpart of both if it is dynamic.

    Args:
        model: what :func:`dysurgery.export` wrote; it takes one tensor.
        input_size: (C, H, W) of an image.
        exported: what that returned.
        images: numbers of images at once.
        seconds: to spend on each number of images.

    Raises:
        UsageError: for no or no positive numbers of images.
        DysurgeryError: if the static counterpart cannot be exported.
    """
    if not images or min(images) < 1:
        raise UsageError(f"latency is measured for 1 image or more, got {', '.join(map(str, images)) or 'none'}")
    where = FORMATS[exported.format]
    original = on_cpu(model)
    dtype = tolerance(original)[0]
    dynamic = any(isinstance(module, DynamicLayer) for module in original.modules())
    networks: dict[tuple[str, str], nn.Module] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dynamic", "static") if dynamic else ("static",):
            network, path = original, exported.path
            if dynamic and name == "static":
                network = freeze(original)
                batches = sorted(set(images))
                path = export(
                    network, input_size, Path(folder) / f"static.{exported.format}", exported.format, batches=batches
                ).path
            networks |= {(name, "torch"): network, (name, where.runtime): where.open(path)}
        found = []
        for count in dict.fromkeys(images):
            batch = torch.randn(count, *input_size, generator=torch.Generator().manual_seed(0)).to(dtype)
            times = latency({" ".join(key): network for key, network in networks.items()}, batch, seconds=seconds)
            found += [Timing(*key, count, times[" ".join(key)]) for key in networks]
    return tuple(found)
