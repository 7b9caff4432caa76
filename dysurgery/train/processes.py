"""One process or many: who this one is, where it computes, and what all of them agree on."""

import os
from dataclasses import dataclass

import torch
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch import distributed as dist

from dysurgery.errors import UsageError


@dataclass(frozen=True)
class Processes:
    """The training processes, of which this is one.

    Attributes:
        device: where this one computes.
        rank: its number; only 0 writes files.
        world: how many there are.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Return each value summed over all processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            self.sum(0.0)


def join_processes(device: str | None = None) -> Processes:
    """Join the processes that ``torchrun`` (or SLURM) started, by timm's set-up; alone without them.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``; by default a GPU if there is one.

    Raises:
        UsageError: for a device that this machine does not have.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"no device {device!r}: expected cpu, cuda or cuda:NUMBER") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: torch sees no GPU here; expected cpu")
    if is_distributed_env() and dist.is_initialized():  # a second run in the same processes
        local = int(os.environ.get("LOCAL_RANK", "0"))
        there = torch.device(kind, local) if kind != "cpu" else torch.device("cpu")
        return Processes(there, dist.get_rank(), dist.get_world_size())
    found = init_distributed_device_so(device)
    return Processes(torch.device(found["device"]), found["global_rank"], found["world_size"])
