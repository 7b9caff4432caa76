"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from dysurgery.errors import DysurgeryError, UsageError


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> Path:
    """Let ``write`` fill a file, which takes the place of ``path`` only when it is complete.

    Raises:
        DysurgeryError: if it cannot be written; what was at ``path`` is still there.
    """
    target = Path(os.path.abspath(path))
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}-", delete=False) as file:
            scratch = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o666 & ~_umask())
        scratch.replace(target)
        sync(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise DysurgeryError(f"cannot write {target}: {_reason(error)}; what was there before is kept") from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
    return target


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` in UTF-8, see :func:`write_atomically`."""
    return write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: str | os.PathLike[str], *keys: str) -> dict[str, Any]:
    """Read a JSON object that has ``keys``.

    Raises:
        UsageError: if it is another object, or none.
        DysurgeryError: if it cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DysurgeryError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object")
    if missing := [key for key in keys if key not in found]:
        raise UsageError(f"{path} has no {missing[0]!r}: another command wrote it")
    return found


def sync(*paths: Path) -> None:
    """Flush files and folders to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return "the disk is full"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
