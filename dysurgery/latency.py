"""How long networks take on this machine: measured in turns, so that whatever else it does hits all of them alike."""

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn


def latency(models: Mapping[str, nn.Module], images: Tensor, *, seconds: float = 2.0) -> dict[str, float]:
    """Return the median time in milliseconds that each model takes for ``images``, in eval mode without gradients.

    Args:
        models: a name for each; their modes are put back.
        images: (B, C, H, W), on the device of the models.
        seconds: to spend on all of them together, at least five rounds.
    """
    modes = {module: module.training for model in models.values() for module in model.modules()}
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        with torch.no_grad():
            for model in models.values():
                model.eval()
                model(images)
            began = time.perf_counter()
            while time.perf_counter() - began < seconds or min(map(len, times.values())) < 5:
                for name, model in models.items():
                    _wait(images)
                    start = time.perf_counter()
                    model(images)
                    _wait(images)
                    times[name].append(1000 * (time.perf_counter() - start))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {name: median(found) for name, found in times.items()}


def _wait(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
