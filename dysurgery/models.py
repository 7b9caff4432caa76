"""A name becomes a static network with its input size and preprocessing: timm, torchvision or ``FILE.py:FACTORY``.

:func:`build` is what the command line calls; :func:`rebuild` makes the architecture of a saved folder again, without
weights or network. Files of weights are the business of :mod:`dysurgery.weights`, a person's own code that of
:mod:`dysurgery.userfile`. Random weights are never a fallback: :class:`WeightsUnavailable` is raised.
"""

import inspect
import os
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
import timm.data
import torch
import torchvision
from timm.models._hub import load_model_config_from_path
from torch import nn

import dysurgery.networks  # noqa: F401 registers its networks with timm
from dysurgery.errors import DysurgeryError, UsageError, did_you_mean, sentence
from dysurgery.source import Source, file_exists, plain
from dysurgery.userfile import run_file, unknown_argument
from dysurgery.weights import FetchError, had, hub_file, load_weights, timm_weights, url_file

Size = tuple[int, int, int]


OWN_ARGUMENTS = (
    "model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "weights", "weights_backbone", "progress",
)  # fmt: skip


@dataclass(frozen=True)
class BuiltModel:
    """A static network and what goes into it.

    Attributes:
        model: in eval mode, on the CPU unless its factory says otherwise.
        source: how to build its architecture again; None if nobody knows.
        label: a short name for folders and tables.
        input_size: (C, H, W) of an image.
        preprocessing: input_size, mean, std, interpolation, crop_pct and crop_mode, as timm understands them; where
            the model says nothing, timm's defaults.
    """

    model: nn.Module
    source: Source | None
    label: str
    input_size: Size
    preprocessing: dict[str, Any]


class WeightsUnavailable(DysurgeryError):  # noqa: N818
    """The pretrained weights cannot be had; ``built`` is the architecture with random ones, to count its cost."""

    def __init__(self, message: str, built: BuiltModel) -> None:
        super().__init__(message)
        self.built = built


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
    args = plain(dict(model_args or {}))
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
        load_weights(built.model, built.label, file)
    return built


def rebuild(source: Source) -> nn.Module:
    """Build the architecture again, in eval mode, with random weights and without the network.

    For a file its code is run, as for any import: load folders of this kind only from people you trust.

    Raises:
        DysurgeryError: if it cannot be built, for instance because the file is gone.
    """
    if source.kind == "file" and not file_exists(source.name):
        raise DysurgeryError(f"{source.name} is gone: put the file back, or pass the static model itself")
    with torch.random.fork_rng(devices=[]):
        if source.kind == "timm":
            model = _create(source.name, partial(timm.create_model, source.name), source.args)
        elif source.kind == "torchvision":
            model = _create(f"torchvision:{source.name}", _torchvision_builder(source.name), source.args)
        else:
            model = run_file(source.name, source.args)
    return model.eval()


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
    return plain(data)


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
        image = [args["img_size"]] * 2 if isinstance(args["img_size"], int) else args["img_size"]
        height, width = image if isinstance(image, list) and len(image) == 2 else (height, width)
    elif cfg.fixed_input_size and (height, width) != tuple(cfg.input_size[1:]):
        args.setdefault("img_size", [height, width])
    weights, lacking = had(timm_weights, cfg) if pretrained else (None, "")
    overlay = {"file": str(weights), "custom_load": cfg.custom_load}
    loading = {"pretrained": True, "pretrained_cfg_overlay": overlay} if weights else {}
    model = _create(name, partial(timm.create_model, name), args, **loading)
    getattr(model, "pretrained_cfg", {}).pop("file", None)  # the place in this machine's cache
    label = timm.models.split_model_name_tag(name)[0]
    size = (channels, height, width)
    return BuiltModel(model, Source("timm", name, args), label, size, _preprocessing(vars(cfg), size)), lacking


def _timm_entry(name: str) -> tuple[str, Any, dict[str, Any]]:
    """Return a timm model's full name, its PretrainedCfg, and the arguments that its repository prescribes."""
    if re.match("hf[-_]hub:", name):
        repository = name.partition(":")[2]
        try:
            folder = hub_file(repository, ["config.json"]).parent
        except FetchError as reason:
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
        return name, cfg, plain({**args, "pretrained_cfg": kept})
    if name in (deprecated := timm.models.get_deprecated_models()):
        if not deprecated[name]:
            raise UsageError(f"timm no longer has {name}")
        name = deprecated[name]
    if not timm.is_model(name):
        raise UsageError(f"unknown model {name!r}{_near(name)}")
    architecture, tag = timm.models.split_model_name_tag(name)
    tags = [full.partition(".")[2] for full in timm.models.get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise UsageError(f"{architecture} has no tag {tag!r}{did_you_mean(tag, tags)}: it has {', '.join(tags)}")
    cfg = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    return f"{architecture}.{cfg.tag}" if cfg.tag else architecture, cfg, {}


def _near(name: str) -> str:
    """Say what an unknown name of timm may have meant."""
    elsewhere = torchvision.models.list_models()
    if name.lower() in elsewhere:
        return f" in timm (did you mean 'torchvision:{name.lower()}'?)"
    if Path(name).is_file():
        return ", which is a file: name the architecture, and the file with --weights"
    hint = did_you_mean(name, [*timm.list_models(), *(n for n in elsewhere if not timm.is_model(n))])
    hint = re.sub(r"'(\w+)'", lambda m: m[0] if timm.is_model(m[1]) else f"'torchvision:{m[1]}'", hint)
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
    weights, lacking = had(url_file, entry.url, check_hash=True) if pretrained else (None, "")
    model = _create(f"torchvision:{name}", factory, args, **({"weights": entry} if weights else {}))
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
    model = run_file(name, args)
    size, preprocessing = preprocessing_of(model, size)
    return BuiltModel(model, Source("file", name, args), name.rpartition(":")[2], size, preprocessing), ""


def is_configured(model: nn.Module) -> bool:
    """Whether ``model`` itself says what goes into it, as timm's do."""
    return isinstance(getattr(model, "pretrained_cfg", getattr(model, "default_cfg", None)), Mapping)


def described(model: nn.Module, source: Source | None = None) -> BuiltModel:
    """Return a network that somebody built with what it says of itself."""
    size, preprocessing = preprocessing_of(model)
    return BuiltModel(model, source, type(model).__name__, size, preprocessing)


def preprocessing_of(model: nn.Module, size: Size | None = None) -> tuple[Size, dict[str, Any]]:
    """Return the input size and preprocessing that ``model`` itself names, completed as timm does.

    Args:
        model: any network; ``pretrained_cfg``, ``default_cfg`` and ``input_size`` are looked at.
        size: (C, H, W), if known; else the model's own, else 3 x 224 x 224.
    """
    cfg = next((c for c in (getattr(model, k, None) for k in ("pretrained_cfg", "default_cfg")) if c), None)
    cfg = cfg if isinstance(cfg, Mapping) else {}
    for own in (getattr(model, "input_size", None), cfg.get("input_size")):
        if size is None and isinstance(own, tuple | list) and len(own) == 3 and all(type(n) is int for n in own):
            size = (own[0], own[1], own[2])
    size = size or (3, 224, 224)
    return size, _preprocessing(cfg, size)


_BUILDERS: dict[str, Callable[[str, dict[str, Any], Size | None, bool], tuple[BuiltModel, str]]] = {
    "timm": _build_timm,
    "torchvision": _build_torchvision,
    "file": _build_file,
}


def _refuse_own(args: Mapping[str, Any]) -> None:
    for name in OWN_ARGUMENTS:
        if name in args:
            raise UsageError(f"{name} is no model argument here: say with --weights which weights to take")


def _create(label: str, factory: Callable[..., Any], args: Mapping[str, Any], **loading: Any) -> nn.Module:
    """Call a library's factory; whatever it raises becomes one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torchvision about itself
            model = factory(**loading, **args)
    except Exception as error:
        wrong = re.search(r"argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
        if wrong and wrong[1] in args:
            unknown_argument(label, wrong[1], _accepted(factory))
        given = ", ".join(f"{key}={value!r}" for key, value in args.items() if key != "pretrained_cfg")
        how = "built with its pretrained weights" if loading else "built"
        raise DysurgeryError(f"{label}({given}) cannot be {how}: {sentence(error)}") from error
    assert isinstance(model, nn.Module)
    return model


def _accepted(factory: Callable[..., Any]) -> list[str]:
    """Return the arguments of the class that a library's factory builds, by building one without storage."""
    with suppress(Exception), torch.device("meta"):
        names = inspect.signature(type(factory())).parameters
        return [name for name in names if name not in OWN_ARGUMENTS]
    return []
