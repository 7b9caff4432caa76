"""Where a static model comes from: a :class:`Source` is what a saved folder keeps in order to build it again."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from torch import Tensor, nn

from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.nn import DynamicLayer, FusedActivation, FusedNorm
from dysurgery.nn.layer import MARKS


@dataclass(frozen=True)
class Source:
    """How to build a static architecture again.

    The name of a file is absolute, so that a saved model loads from any working directory. Written with its
    ``folder``, it is kept relative to that as well: if the absolute one is gone, because folder and file moved
    together, that is where it is looked for.

    Attributes:
        kind: ``timm``, ``torchvision`` or ``file``.
        name: ``resnet18.a1_in1k``, ``resnet18`` or ``/path/to/FILE.py:FACTORY``.
        args: keyword arguments of the factory, as plain JSON values.
    """

    kind: str
    name: str
    args: dict[str, Any] = field(default_factory=dict)

    def to_json(self, folder: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Return plain values, for a config that will lie in ``folder``."""
        data = {"kind": self.kind, "name": self.name, "args": self.args}
        if folder is not None and self.kind == "file":
            with suppress(ValueError):  # on another drive
                data["relative"] = Path(os.path.relpath(self.name, folder)).as_posix()
        return data

    @classmethod
    def from_json(cls, data: Any, folder: str | os.PathLike[str] | None = None) -> "Source":
        """Return the source that :meth:`to_json` wrote, in a config that lies in ``folder``.

        Raises:
            DysurgeryError: if it is none.
        """
        match data:
            case {"kind": "timm" | "torchvision" | "file" as kind, "name": str(name), "args": dict(args)} if name:
                relative = data.get("relative")
            case _:
                raise DysurgeryError(
                    f"no source of a model: {str(data)[:80]}; "
                    "expected kind (timm, torchvision or file), name (text) and args (an object)"
                )
        if kind == "file" and folder is not None and isinstance(relative, str) and not file_exists(name):
            moved = os.path.abspath(os.path.join(folder, relative))
            name = moved if file_exists(moved) else name
        return cls(kind, name, dict(args))


def describe(model: nn.Module) -> Source | None:
    """Find out how a model of ``timm.create_model`` was made, by building it again on the meta device and comparing.

    Args:
        model: static or converted; a dynamic layer matches whatever stands in its place.

    Returns:
        Its source, or None if there is any doubt.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not timm.is_model(architecture := str(cfg.get("architecture"))):
        return None
    default, tag = timm.get_pretrained_cfg(architecture), cfg.get("tag")
    tagged = f"{architecture}.{tag}"
    named = default is not None and tag != default.tag and tagged in timm.models.get_arch_pretrained_cfgs(architecture)
    name = tagged if named else architecture
    usual = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    args = dict(getattr(model, "_model_args", {}))  # what recent versions of timm were called with
    for key, now, otherwise in (
        ("num_classes", getattr(model, "num_classes", None), usual.num_classes),
        ("in_chans", _channels(model, cfg.get("first_conv")), usual.input_size[0]),
    ):
        if now is not None and (now != otherwise or key in args):
            args[key] = now
    try:
        args = plain(args)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin = timm.create_model(name, **args)
        return Source("timm", name, args) if _same_tree(model, twin) else None
    except Exception:  # whatever it is, there is doubt
        return None


def _channels(model: nn.Module, first: Any) -> int | None:
    """Return the number of channels that a timm model takes; older versions show it only in the first convolution."""
    found = getattr(model, "in_chans", None)
    if found is None and isinstance(first, str):
        with suppress(AttributeError):
            found = getattr(model.get_submodule(first), "in_channels", None)
    return found if isinstance(found, int) else None


def _same_tree(model: nn.Module, twin: nn.Module) -> bool:
    """Whether both hold the same modules with the same options and shapes; what surgery made matches what was there."""
    made = {p for p, m in model.named_modules(remove_duplicate=False) if _by_surgery(m)}

    def outline(root: nn.Module) -> dict[str, object]:
        return {
            path: (
                None
                if path in made
                else (type(m), m.extra_repr(), {n: t.shape for n, t in [*_tensors(m)]}, "forward" in vars(m))
            )
            for path, m in root.named_modules(remove_duplicate=False)
            if not any(path.startswith(f"{layer}.") for layer in made)
        }

    return outline(model) == outline(twin)


def _by_surgery(module: nn.Module) -> bool:
    return isinstance(module, DynamicLayer | FusedNorm | FusedActivation) or any(name in vars(module) for name in MARKS)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def plain(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as they will come back from JSON.

    Raises:
        UsageError: for a value that will not.
    """
    for name, value in args.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise UsageError(f"model argument {name}={value!r} is no plain value, so it could not be saved") from None
    plain: dict[str, Any] = json.loads(json.dumps(dict(args)))
    return plain


def file_exists(name: str) -> bool:
    """Whether the file of a ``FILE.py:FACTORY`` exists."""
    return Path(name.rpartition(":")[0]).is_file()
