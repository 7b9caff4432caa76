"""A name becomes a static network with its input size and preprocessing: timm, torchvision or ``FILE.py:FACTORY``.

:func:`build` is what the command line calls; :func:`rebuild` makes the architecture of a saved folder again, without
weights or network; :func:`describe` finds out how a timm model was made. A weight file is looked for in the cache
first and taken as it is found there; only then is the network asked, after one short request whether it is there.
Random weights are never a fallback: :class:`WeightsUnavailable` is raised.
"""

import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
import threading
import traceback
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any, NoReturn

import huggingface_hub
import timm
import timm.data
import torch
import torchvision
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
)
from timm.models._hub import load_model_config_from_path
from torch import Tensor, nn

from dysurgery.errors import DysurgeryError, UsageError, did_you_mean
from dysurgery.nn import DynamicLayer

PATIENCE = 3.0
"""Seconds that the one request may take which asks whether the network is there."""

Size = tuple[int, int, int]
_OWN_ARGUMENTS = (
    "model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "weights", "weights_backbone", "progress",
)  # fmt: skip


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
        if kind == "file" and folder is not None and isinstance(relative, str) and not _is_file(name):
            moved = os.path.abspath(os.path.join(folder, relative))
            name = moved if _is_file(moved) else name
        return cls(kind, name, dict(args))


@dataclass(frozen=True)
class BuiltModel:
    """A static network and what goes into it.

    Attributes:
        model: in eval mode, on the CPU unless its factory says otherwise.
        source: how to build its architecture again.
        label: a short name for folders and tables.
        input_size: (C, H, W) of an image.
        preprocessing: input_size, mean, std, interpolation, crop_pct and crop_mode, as timm understands them; where
            the model says nothing, timm's defaults.
    """

    model: nn.Module
    source: Source
    label: str
    input_size: Size
    preprocessing: dict[str, Any]


class WeightsUnavailable(DysurgeryError):  # noqa: N818
    """The pretrained weights cannot be had; ``built`` is the architecture with random ones, to count its cost."""

    def __init__(self, message: str, built: BuiltModel) -> None:
        super().__init__(message)
        self.built = built


class _FetchError(Exception):
    """Why a file is neither in the cache nor to be downloaded."""


def build(
    spec: str,
    *,
    weights: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_size: Size | None = None,
    seed: int = 0,
) -> BuiltModel:
    """Build the static network that ``spec`` names. The global random state stays as it was.

    Args:
        spec: a name of timm (``resnet18``, ``resnet18.a1_in1k``, ``hf-hub:user/repo``), ``torchvision:NAME``, or
            ``FILE.py:FACTORY``: a function or class that returns an nn.Module. The file's code is run.
        weights: ``pretrained`` (the default for timm and torchvision), ``random``, or a .safetensors, .pth, .pt or
            .bin file with a state dict, which must fit; EMA weights are preferred if it holds both. For
            ``FILE.py:FACTORY``, None and ``random`` both mean what the factory returns.
        model_args: keyword arguments of the factory, as plain JSON values.
        input_size: (C, H, W); by default the model's own. timm models are built for C channels, and for H x W where
            their size is fixed.
        seed: of random weights, also of a new classifier on pretrained ones.

    Raises:
        UsageError: for an unknown name or argument.
        WeightsUnavailable: if the pretrained weights cannot be had.
        DysurgeryError: if the model cannot be built, or the weight file cannot be read or does not fit.
    """
    args = _plain(dict(model_args or {}))
    if input_size is not None and (len(input_size) != 3 or min(input_size) < 1):
        raise UsageError(f"an input size is three positive numbers (C, H, W), got {input_size}")
    file = None if weights in (None, "pretrained", "random") else Path(weights).expanduser()
    if file is not None and not file.is_file():
        hint = did_you_mean(str(weights), ("pretrained", "random"))
        raise DysurgeryError(f"weights {weights!r}: there is no such file, nor is it 'pretrained' or 'random'{hint}")
    kind, name = _parse(spec)
    if kind == "file" and weights == "pretrained":
        raise UsageError(f"{spec} has no pretrained weights but those that its factory loads: leave out --weights")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        built, lacking = _BUILDERS[kind](name, args, input_size, weights in (None, "pretrained"))
    built.model.eval()
    if lacking:
        raise WeightsUnavailable(
            f"the pretrained weights of {spec} cannot be had: {lacking}; go on with --weights FILE or --weights random",
            built,
        )
    if file is not None:
        _load_weights(built, file)
    return built


def rebuild(source: Source) -> nn.Module:
    """Build the architecture again, in eval mode, with random weights and without the network.

    For a file its code is run, as for any import: load folders of this kind only from people you trust.

    Raises:
        DysurgeryError: if it cannot be built, for instance because the file is gone.
    """
    if source.kind == "file" and not _is_file(source.name):
        raise DysurgeryError(f"{source.name} is gone: put the file back, or pass the static model itself")
    with torch.random.fork_rng(devices=[]):
        if source.kind == "timm":
            model = _create(source.name, partial(timm.create_model, source.name), source.args)
        elif source.kind == "torchvision":
            model = _create(f"torchvision:{source.name}", _torchvision_builder(source.name), source.args)
        else:
            model = _run_file(source.name, source.args)
    return model.eval()


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
        args = _plain(args)
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
    """Whether both hold the same modules with the same options and shapes; dynamic layers match what they replace."""
    dynamic = {p for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, DynamicLayer)}

    def outline(root: nn.Module) -> dict[str, object]:
        return {
            path: (
                None
                if path in dynamic
                else (type(m), m.extra_repr(), {n: t.shape for n, t in [*_tensors(m)]}, "forward" in vars(m))
            )
            for path, m in root.named_modules(remove_duplicate=False)
            if not any(path.startswith(f"{layer}.") for layer in dynamic)
        }

    return outline(model) == outline(twin)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _plain(args: Mapping[str, Any]) -> dict[str, Any]:
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


def _is_file(name: str) -> bool:
    """Whether the file of a ``FILE.py:FACTORY`` exists."""
    return Path(name.rpartition(":")[0]).is_file()


def _parse(spec: str) -> tuple[str, str]:
    """Split ``spec`` into a kind of source and a name."""
    if spec.startswith("torchvision:"):
        return "torchvision", spec.removeprefix("torchvision:")
    if match := re.fullmatch(r"(.+\.py)(?::(.*))?", spec):
        file, factory = match.groups()
        if not factory:
            raise UsageError(f"{spec} names no factory: give {file}:NAME, a function or class that returns the model")
        return "file", f"{os.path.abspath(os.path.expanduser(file))}:{factory}"
    return "timm", spec


def _preprocessing(cfg: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """Complete ``cfg`` as timm does; for another number of channels, each gets the average mean and std."""
    data = timm.data.resolve_data_config({"input_size": size}, pretrained_cfg=dict(cfg))
    for key in ("mean", "std"):
        if len(data[key]) != size[0]:
            data[key] = [fmean(data[key])] * size[0]
    return _plain(data)


# Building


def _build_timm(name: str, args: dict[str, Any], size: Size | None, pretrained: bool) -> tuple[BuiltModel, str]:
    _refuse_own(args)
    name, cfg, saved = _timm_entry(name)
    args = {**saved, **args}
    channels, height, width = size or (args.get("in_chans") or cfg.input_size[0], *cfg.input_size[1:])
    if channels != args.get("in_chans", cfg.input_size[0]):
        if "in_chans" in args:
            raise UsageError(f"in_chans={args['in_chans']} contradicts an input of {channels} channels")
        args["in_chans"] = channels
    if "img_size" in args and size is None:
        image = args["img_size"]
        height, width = (image, image) if isinstance(image, int) else image
    elif cfg.fixed_input_size and (height, width) != tuple(cfg.input_size[1:]):
        args.setdefault("img_size", [height, width])
    weights, lacking = _had(_timm_weights, cfg) if pretrained else (None, "")
    overlay = {"file": str(weights), "custom_load": cfg.custom_load} if weights else {}
    factory = partial(timm.create_model, name, pretrained=bool(weights), pretrained_cfg_overlay=overlay)
    model = _create(name, factory, args, weights)
    getattr(model, "pretrained_cfg", {}).pop("file", None)  # the place in this machine's cache
    label = timm.models.split_model_name_tag(name)[0]
    size = (channels, height, width)
    return BuiltModel(model, Source("timm", name, args), label, size, _preprocessing(vars(cfg), size)), lacking


def _timm_entry(name: str) -> tuple[str, Any, dict[str, Any]]:
    """Return a timm model's full name, its PretrainedCfg, and the arguments that its repository prescribes."""
    if re.match("hf[-_]hub:", name):
        repository = name.partition(":")[2]
        try:
            folder = _hub_file(repository, ["config.json"]).parent
        except _FetchError as reason:
            raise DysurgeryError(f"{name} cannot be built: {reason}") from reason
        try:
            data, name, args = load_model_config_from_path(folder)
            data |= {"architecture": name, "source": None, "file": None, "hf_hub_id": repository}
            cfg = timm.models.PretrainedCfg(**data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DysurgeryError(f"{repository} is no timm model: its config.json is of another kind") from error
        if not timm.is_model(name):
            raise DysurgeryError(f"{repository} is a {name}, which timm {timm.__version__} does not know")
        kept = replace(cfg, label_names=None, label_descriptions=None).to_dict(remove_source=True)
        return name, cfg, _plain({**args, "pretrained_cfg": kept})
    if name in (deprecated := timm.models.get_deprecated_models()):
        if not deprecated[name]:
            raise UsageError(f"timm no longer has {name}")
        name = deprecated[name]
    known = timm.list_models()
    if not timm.is_model(name):
        raise UsageError(f"unknown model {name!r}{_near(name, known)}")
    architecture, tag = timm.models.split_model_name_tag(name)
    tags = [full.partition(".")[2] for full in timm.models.get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise UsageError(f"{architecture} has no tag {tag!r}{did_you_mean(tag, tags)}: it has {', '.join(tags)}")
    cfg = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    return f"{architecture}.{cfg.tag}" if cfg.tag else architecture, cfg, {}


def _near(name: str, known: Iterable[str]) -> str:
    """Say what an unknown name of timm may have meant."""
    elsewhere = torchvision.models.list_models()
    if name.lower() in elsewhere:
        return f" in timm (did you mean 'torchvision:{name.lower()}'?)"
    if Path(name).is_file():
        return ", which is a file: name the architecture, and the file with --weights"
    hint = did_you_mean(name, known) or re.sub(r"'(\w+)'", r"'torchvision:\1'", did_you_mean(name, elsewhere))
    return hint or ": expected a name of timm, torchvision:NAME, FILE.py:FACTORY or a saved folder"


def _torchvision_builder(name: str) -> Callable[..., Any]:
    """Return the factory of a torchvision architecture, which downloads nothing."""
    try:
        builder = torchvision.models.get_model_builder(name)
    except ValueError:
        near = did_you_mean(name, torchvision.models.list_models())
        if timm.is_model(name):
            near = f" (did you mean timm's {name!r}, without 'torchvision:'?)"
        raise UsageError(f"unknown model 'torchvision:{name}'{near}") from None
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    return partial(builder, weights=None, **backbone)


def _build_torchvision(name: str, args: dict[str, Any], size: Size | None, pretrained: bool) -> tuple[BuiltModel, str]:
    _refuse_own(args)
    name = name.lower()
    factory = _torchvision_builder(name)
    task = inspect.unwrap(torchvision.models.get_model_builder(name)).__module__.split(".")[2]
    if task in ("detection", "video", "optical_flow"):
        raise DysurgeryError(
            f"torchvision:{name} does not take one image (it is a model for {task.replace('_', ' ')}): "
            "build it in Python and call dysurgery.convert(model, example)"
        )
    entry = torchvision.models.get_model_weights(name).DEFAULT
    entry = entry.meta.get("unquantized", entry)
    weights, lacking = _had(_url_file, entry.url, check_hash=True) if pretrained else (None, "")
    model = _create(f"torchvision:{name}", partial(factory, weights=entry) if weights else factory, args, weights)
    if weights:  # they set arguments of their own, which a rebuild without them needs
        for key in ("transform_input", "aux_logits", "image_size"):
            if hasattr(model, key):
                args = {**args, key: getattr(model, key)}
        if "aux_loss" in inspect.signature(factory).parameters:
            args = {**args, "aux_loss": getattr(model, "aux_classifier", None) is not None}
    transforms = entry.transforms()
    crop = getattr(transforms, "crop_size", None) or [224]
    size = size or (3, crop[0], crop[-1])
    cfg = {key: getattr(transforms, key) for key in ("mean", "std")} | {
        "interpolation": transforms.interpolation.value,
        "crop_pct": crop[0] / transforms.resize_size[0],
    }
    return BuiltModel(model, Source("torchvision", name, args), name, size, _preprocessing(cfg, size)), lacking


def _build_file(name: str, args: dict[str, Any], size: Size | None, pretrained: bool) -> tuple[BuiltModel, str]:
    model = _run_file(name, args)
    cfg = next((c for c in (getattr(model, k, None) for k in ("pretrained_cfg", "default_cfg")) if c), None)
    cfg = cfg if isinstance(cfg, Mapping) else {}
    for own in (getattr(model, "input_size", None), cfg.get("input_size")):
        if size is None and isinstance(own, tuple | list) and len(own) == 3 and all(type(n) is int for n in own):
            size = (own[0], own[1], own[2])
    size = size or (3, 224, 224)
    label = name.rpartition(":")[2]
    return BuiltModel(model, Source("file", name, args), label, size, _preprocessing(cfg, size)), ""


_BUILDERS: dict[str, Callable[[str, dict[str, Any], Size | None, bool], tuple[BuiltModel, str]]] = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
    "file": _build_file,
}


def _refuse_own(args: Mapping[str, Any]) -> None:
    for name in _OWN_ARGUMENTS:
        if name in args:
            raise UsageError(f"{name} is no model argument here: say with --weights which weights to take")


def _create(label: str, factory: Callable[..., Any], args: Mapping[str, Any], weights: Path | None = None) -> nn.Module:
    """Call a library's factory; whatever it raises becomes one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torchvision about itself
            model = factory(**args)
    except Exception as error:
        wrong = re.search(r"argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
        if wrong and wrong[1] in args:
            _unknown_argument(label, wrong[1], _accepted(factory))
        given = ", ".join(f"{key}={value!r}" for key, value in args.items() if key != "pretrained_cfg")
        where = f" with the weights {weights}" if weights else ""
        raise DysurgeryError(f"{label}({given}) cannot be built{where}: {_sentence(error)}") from error
    assert isinstance(model, nn.Module)
    return model


def _accepted(factory: Callable[..., Any]) -> list[str]:
    """Return the arguments of the class that a library's factory builds, by building one without storage."""
    with suppress(Exception), torch.device("meta"):
        return [*inspect.signature(type(factory())).parameters]
    return []


def _unknown_argument(label: str, name: str, accepted: Iterable[str]) -> NoReturn:
    accepted = [a for a in accepted if a not in _OWN_ARGUMENTS and a != "kwargs"]
    listing = f"; it takes {', '.join(accepted)}" if accepted else ""
    raise UsageError(f"{label} takes no argument {name!r}{did_you_mean(name, accepted)}{listing}")


# A person's own file

_siblings: dict[str, Path] = {}
"""Modules that a file of a person's own imported from its folder -> the folder."""


def _run_file(name: str, args: Mapping[str, Any]) -> nn.Module:
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
                _unknown_argument(name, unknown[0], parameters)
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
    return f"{place}{_sentence(error)}"


def _sentence(error: BaseException) -> str:
    """Return an error's type and its message, on one line and not too long of it."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# Weights


def _load_weights(built: BuiltModel, file: Path) -> None:
    """Load a file's state dict, which must fit key by key and shape by shape."""
    try:
        state = timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:
        if _holds_objects(file):
            raise DysurgeryError(
                f"{file} holds pickled Python objects, which are not read because they can run code: "
                "save model.state_dict() alone, with safetensors or torch.save"
            ) from error
        raise DysurgeryError(f"{file} cannot be read as a state dict ({_sentence(error)})") from error
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise DysurgeryError(f"{file} is no state dict: it holds {_few(map(str, state)) or 'nothing'}, and no tensor")
    own = built.model.state_dict()
    shapes, kinds = [], []
    for key in own.keys() & state.keys():
        mine, theirs = own[key], state[key]
        if not isinstance(mine, Tensor) or nn.parameter.is_lazy(mine) or not isinstance(theirs, Tensor):
            continue
        if mine.shape != theirs.shape:
            shapes.append(key)
        elif mine.is_floating_point() and not theirs.is_floating_point():
            kinds.append(f"{key} {theirs.dtype}")
    if kinds:
        raise DysurgeryError(f"{file} is quantised ({_few(sorted(kinds))}): dequantise it to floating point first")
    try:
        found = built.model.load_state_dict({k: v for k, v in state.items() if k not in shapes}, strict=False)
    except RuntimeError as error:
        raise DysurgeryError(f"{file} does not fit {built.label}: {_sentence(error)}") from error
    shapes.sort(key=list(own).index)
    missing = [key for key in found.missing_keys if key not in shapes]
    differing = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in shapes]
    problems = [
        f"{len(keys)} {what} ({_few(keys)})"
        for keys, what in ((missing, "missing"), (found.unexpected_keys, "unexpected"), (differing, "of another shape"))
        if keys
    ]
    if problems:
        layers = {key.rpartition(".")[0] for key in shapes}
        classes = state[shapes[0]].shape[0] if len(layers) == 1 and state[shapes[0]].dim() else None
        hint = f"; for its {classes} classes give --model-arg num_classes={classes}" if classes else ""
        raise DysurgeryError(f"{file} does not fit {built.label}: {', '.join(problems)}{hint}")


def _holds_objects(file: Path) -> bool:
    """Whether a file that could not be read is a checkpoint which holds more than tensors."""
    try:
        return bool(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # it is no checkpoint at all
        return False


def _few(items: Iterable[str], count: int = 3) -> str:
    names = list(items)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _had(fetch: Callable[..., Path], *args: Any, **kwargs: Any) -> tuple[Path | None, str]:
    """Return a fetched file, or why it cannot be had."""
    try:
        return fetch(*args, **kwargs), ""
    except _FetchError as reason:
        return None, str(reason)


def _timm_weights(cfg: Any) -> Path:
    """Return the weight file of a timm configuration, from the cache or downloaded."""
    if cfg.hf_hub_id:
        name = cfg.hf_hub_filename or "pytorch_model.bin"
        safe = re.sub(r"pytorch_model(?=\.bin$)", "model", name).removesuffix(".bin") + ".safetensors"
        return _hub_file(cfg.hf_hub_id, [safe, name] if name.endswith(".bin") else [name])
    if cfg.url:
        url, filename = (cfg.url, None) if isinstance(cfg.url, str) else cfg.url
        return _url_file(url, filename)
    raise _FetchError(f"timm {timm.__version__} has none")


def _hub_file(repository: str, filenames: list[str]) -> Path:
    """Return the first of ``filenames`` that the cache has, else that the hub has, of ``user/repo[@revision]``."""
    repository, _, revision = repository.partition("@")
    fetch = partial(huggingface_hub.hf_hub_download, repository, revision=revision or None)
    try:
        for filename in filenames:
            with suppress(LocalEntryNotFoundError):
                return Path(fetch(filename=filename, local_files_only=True))
        _check_reachable(
            lambda: get_session().head(constants.ENDPOINT, timeout=PATIENCE), constants.ENDPOINT,
            f"{repository} is not in the cache {constants.HF_HUB_CACHE}", "HF_HUB_CACHE",
        )  # fmt: skip
        for filename in filenames:
            try:
                with _no_progress_bars():
                    return Path(fetch(filename=filename))
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError):  # the connection broke
                    raise
    except _FetchError:
        raise
    except Exception as error:
        raise _FetchError(f"{repository}: {_sentence(error)}") from error
    raise _FetchError(f"{repository} has no {' or '.join(filenames)}")


def _url_file(url: str, filename: str | None = None, check_hash: bool = False) -> Path:
    """Return the file behind ``url`` from torch's cache, downloaded if it is not there yet."""
    filename = filename or url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", filename)
    if path.exists():
        return path

    def ask() -> None:
        with suppress(urllib.error.HTTPError):  # an answer too
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()

    _check_reachable(ask, url, f"{filename} is not in the cache {path.parent}", "TORCH_HOME")
    expected = torch.hub.HASH_REGEX.search(filename) if check_hash else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), expected[1] if expected else None, progress=False)
    except Exception as error:
        raise _FetchError(f"{url}: {_sentence(error)}") from error
    return path


def _check_reachable(ask: Callable[[], object], where: str, absent: str, variable: str) -> None:
    """Raise _FetchError unless ``ask`` returns in time; resolving a host name heeds no timeout, hence the thread."""
    answer = [f"no answer within {PATIENCE:g} s"]

    def attempt() -> None:
        try:
            ask()
            answer[0] = ""
        except Exception as error:
            answer[0] = _sentence(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE + 0.5)
    if answer[0]:
        raise _FetchError(
            f"{absent}, and {where} cannot be reached ({answer[0]}); run once where it can be, or point {variable} at "
            "a cache that has them"
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
