"""How long networks take on this machine: measured in turns, so that whatever else it does hits all of them alike."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from dysurgery.errors import UsageError

Name = TypeVar("Name")

ROUNDS = 5
"""At least so many, however long they take."""


def check_seconds(seconds: float) -> None:
    """Refuse a time that cannot be spent.

    Raises:
        UsageError: for none, or for ever.
    """
    if not 0 < seconds < float("inf"):
        raise UsageError(f"the seconds to spend are more than 0, got {seconds:g}")


def in_turns(
    steps: Mapping[Name, Callable[[], object]], device: torch.device, *, seconds: float = 2.0
) -> dict[Name, list[float]]:
    """Return the times in milliseconds that each step took, a round of all of them after the other.

    A round that is not counted comes first. Each has its own random order, as a step that follows one with the same
    weights finds them in the cache. The garbage collector rests meanwhile, and a GPU is waited for.

    Args:
        steps: a name for each.
        device: where they run.
        seconds: to spend on all of them together, at least :data:`ROUNDS` rounds.
    """
    times: dict[Name, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    order, rng = list(steps.items()), random.Random(0)
    with no_collection():
        began = time.perf_counter()
        while time.perf_counter() - began < seconds or min(map(len, times.values())) < ROUNDS:
            rng.shuffle(order)
            for name, step in order:
                wait(device)
                start = time.perf_counter()
                step()
                wait(device)
                times[name].append(1000 * (time.perf_counter() - start))
    return times


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now, which may take as long as a network, and none during the block; blocks may be nested."""
    collecting = gc.isenabled()
    if collecting:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def latency(models: Mapping[str, nn.Module], images: Tensor, *, seconds: float = 2.0) -> dict[str, float]:
    """Return the median time in milliseconds that each model takes for ``images``, in eval mode without gradients.

    Args:
        models: a name for each; their modes are put back.
        images: (B, C, H, W), on the device of the models.
        seconds: to spend on all of them together, at least five rounds.
    """
    modes = {module: module.training for model in models.values() for module in model.modules()}
    try:
        with torch.no_grad():
            steps = {name: partial(model.eval(), images) for name, model in models.items()}
            times = in_turns(steps, images.device, seconds=seconds)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {name: median(found) for name, found in times.items()}


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
