"""A person's own ``FILE.py:FACTORY``: imported by its path, and what goes wrong in it said with file and line.

Called by :mod:`dysurgery.models`.
"""

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from torch import nn

from dysurgery.errors import DysurgeryError, UsageError, did_you_mean, sentence

_siblings: dict[str, Path] = {}
"""Modules that a file of a person's own imported from its folder -> the folder."""


def run_file(name: str, args: Mapping[str, Any]) -> nn.Module:
    """Import FILE.py and call its FACTORY."""
    file, _, factory_name = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"there is no file {file}")
    with _importable(path.parent):
        try:
            module = _import(path)
        except (Exception, SystemExit) as error:
            raise DysurgeryError(f"{file} cannot be imported: {_located(error, path.parent)}") from error
        factory = getattr(module, factory_name, None)
        if not callable(factory) or isinstance(factory, nn.Module):
            own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
            own = [n for n in own if callable(getattr(module, n)) and not isinstance(getattr(module, n), nn.Module)]
            what = "is no function or class" if hasattr(module, factory_name) else "does not exist"
            listing = f"; it defines {', '.join(own)}" if own else ""
            raise UsageError(f"{factory_name!r} {what} in {file}{did_you_mean(factory_name, own)}{listing}")
        parameters = inspect.signature(factory).parameters
        try:
            inspect.signature(factory).bind(**args)
        except TypeError as error:
            unknown = [name for name in args if name not in parameters]
            if unknown:
                unknown_argument(name, unknown[0], parameters)
            raise UsageError(f"{name}: {error}; give it with --model-arg NAME=VALUE") from error
        try:
            model = factory(**args)
        except (Exception, SystemExit) as error:
            raise DysurgeryError(f"{name} fails: {_located(error, path.parent)}") from error
    if not isinstance(model, nn.Module):
        raise DysurgeryError(f"{name} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _import(path: Path) -> ModuleType:
    """Import a file by its path, under a name that stands for its path and content, so that an edit is seen."""
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:12]
    name = "_".join(["dysurgery_file", re.sub(r"\W", "_", path.stem), digest])
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, pickle and torch.compile look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the block import from ``folder``, even if another folder's file has imported something of the same name."""
    for name, home in list(_siblings.items()):
        top = name.partition(".")[0]
        if home != folder and ((folder / f"{top}.py").exists() or (folder / top).is_dir()):
            sys.modules.pop(name, None)
            del _siblings[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder):
                _siblings[name] = folder


def _located(error: BaseException, folder: Path) -> str:
    """Return an error of a person's own code with the last place in their folder that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(folder)]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    place = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
    return f"{place}{sentence(error)}"


def unknown_argument(label: str, name: str, accepted: Iterable[str]) -> NoReturn:
    """Raise the error for an argument that a factory does not take, with those that it does."""
    accepted = [a for a in accepted if a != "kwargs"]
    listing = f"; it takes {', '.join(accepted)}" if accepted else ""
    raise UsageError(f"{label} takes no argument {name!r}{did_you_mean(name, accepted)}{listing}")
