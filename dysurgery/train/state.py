"""Everything that a run needs to go on as if it had never stopped, in one file that is whole or absent.

Order and augmentation of the images, dropout and tau are functions of (seed, step), so the step stands for all of
them; what is left are the tensors of model, optimizer and moving average, and the figures so far. Read back with
``weights_only=True``: nothing is unpickled.
"""

from pathlib import Path
from typing import Any

import torch

from dysurgery.errors import DysurgeryError
from dysurgery.files import write_atomically

FORMAT = 2
STATE = "state.pt"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) to ``folder``; the last one is kept until this one is complete.

    Raises:
        DysurgeryError: if it cannot be written.
    """
    write_atomically(folder / STATE, lambda file: torch.save({"format": FORMAT, **state}, file))


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return the last state in ``folder``, its tensors on the CPU; None if there is none.

    Raises:
        DysurgeryError: if it cannot be read, or is damaged.
    """
    path = folder / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DysurgeryError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever the reader makes of damaged bytes
        raise DysurgeryError(f"{path} is damaged: remove it to begin this part of the run again") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DysurgeryError(f"{path} is no state of format {FORMAT}: it was written by another version")
    return state


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Return what differs between two trees of plain values, each as ``section.key: before -> now``."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{path}.{key}" if path else str(key)
            found += differences(before.get(key), now.get(key), inner)
        return found
    return [] if before == now else [f"{path}: {before} -> {now}"]
