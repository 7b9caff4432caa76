"""A model to disk and back: ``config.json`` (how to build it) and ``model.safetensors`` (its tensors), no pickle.

The static network is built again from its source (:mod:`dysurgery.models`) or passed in, dynamic layers are put where
the config says, what :mod:`dysurgery.fuse` and :mod:`dysurgery.demote` did to it is done again, and the tensors are
loaded strictly; tau is among them. Writing is atomic: a folder is either the old one or the new one.
"""

import json
import os
import platform
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, fx, nn

from dysurgery import models
from dysurgery._version import __version__
from dysurgery.autotune import set_ways, ways_of
from dysurgery.errors import DysurgeryError, UsageError, did_you_mean
from dysurgery.files import sync, write_text
from dysurgery.nn import DynamicLayer, FusedNorm, folded, handler, temperature
from dysurgery.nn.layer import BIAS_ADDED, WAS_DYNAMIC
from dysurgery.nn.links import Link, connect, links_of
from dysurgery.nn.norm import add_bias
from dysurgery.rewrite import graft, graft_in_place, rewrite_graphs
from dysurgery.source import Source, describe
from dysurgery.weights import FetchError, hub_file, with_metadata

FORMAT = 4
"""Since 2: ``static``, ``biases`` and ``norms``; since 3: ``ways``; since 4: ``links``."""
READABLE = (1, 2, 3, 4)
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Config:
    """What ``config.json`` holds.

    Attributes:
        source: where the static network comes from; None if it must be passed to :func:`load`.
        layers: path of each dynamic layer -> its options (K, reduction, gate).
        static: paths of the layers that were dynamic and are static again (:func:`dysurgery.freeze`).
        biases: paths of the layers, dynamic or static, that got a bias that their source does not have.
        norms: paths of the BatchNorms that such layers have taken in (:func:`dysurgery.fuse_bn`).
        links: what such convolutions do beside, see :class:`dysurgery.nn.links.Link`.
        ways: path of each tuned layer -> situation -> way, see :func:`dysurgery.autotune`.
        graphs: path of each GraphModule ("" is the model) -> how it was traced; empty for a grafted model.
        tau: the temperature, for people to read; the tensors hold it.
        input_size: (C, H, W), if known.
        preprocessing: what the images went through: mean, std, interpolation and so on.
        report: what the conversion measured.
        versions: of what wrote it.
    """

    source: Source | None
    layers: dict[str, dict[str, Any]]
    static: list[str]
    biases: list[str]
    norms: list[str]
    links: list[Link]
    ways: dict[str, dict[str, str]]
    graphs: dict[str, dict[str, Any]]
    tau: float | None
    input_size: tuple[int, int, int] | None
    preprocessing: dict[str, Any]
    report: dict[str, Any]
    versions: dict[str, str]

    def to_json(self, folder: Path) -> dict[str, Any]:
        """Return the config as plain values, to be written to ``folder``."""
        source = None if self.source is None else self.source.to_json(folder)
        return {"format": FORMAT, **vars(self), "source": source}


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    source: Source | None = None,
    input_size: tuple[int, int, int] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write ``model`` to ``folder``, all or nothing.

    Args:
        model: a converted model (a static one is fine too).
        folder: created with its parents.
        source: where the static network comes from. None finds out for a model of ``timm.create_model``; any other
            has then to be passed to :func:`load`.
        input_size: (C, H, W) of an image.
        preprocessing: what images go through.
        report: anything worth keeping about the conversion, as plain values.
        force: replace an existing saved folder.

    Returns:
        The folder.

    Raises:
        DysurgeryError: if the folder exists (without ``force``, or if it holds anything else), or cannot be written.
    """
    target = check_target(folder, force=force)
    layers = {path: m.options() for path, m in model.named_modules() if isinstance(m, DynamicLayer)}
    config = Config(
        source=source or describe(model),
        layers=layers,
        static=[path for path, m in model.named_modules() if hasattr(m, WAS_DYNAMIC)],
        biases=[path for path, m in model.named_modules() if hasattr(m, BIAS_ADDED)],
        norms=[path for path, m in model.named_modules() if isinstance(m, FusedNorm)],
        links=list(links_of(model)),
        ways=ways_of(model),
        graphs={
            path: m.meta["dysurgery"]
            for path, m in model.named_modules()
            if isinstance(m, fx.GraphModule) and "dysurgery" in m.meta
        },
        tau=temperature(model) if layers else None,
        input_size=input_size,
        preprocessing=dict(preprocessing or {}),
        report=dict(report or {}),
        versions={
            "dysurgery": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
    )
    text = _config_text(config, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            safetensors.torch.save_model(model, str(new / WEIGHTS))
            (new / CONFIG).write_text(text, encoding="utf-8")
            sync(new / WEIGHTS, new / CONFIG, new)
            if target.exists():
                target.rename(Path(scratch) / "old")
            new.rename(target)
            sync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise DysurgeryError(f"cannot write {target}: {error}") from error
    return target


def _config_text(config: Config, folder: Path) -> str:
    try:
        return json.dumps(config.to_json(folder), indent=2) + "\n"
    except TypeError as error:
        raise UsageError(f"config.json takes plain values only: {error}") from error


def write_config(config: Config, folder: Path) -> None:
    """Write ``config.json`` alone to ``folder``, beside weights that are there already."""
    write_text(folder / CONFIG, _config_text(config, folder))


def check_target(folder: str | os.PathLike[str], *, force: bool) -> Path:
    """Return ``folder`` as a path if :func:`save` may write there.

    Raises:
        DysurgeryError: if it exists, and is not a saved folder that ``force`` allows to replace.
    """
    target = Path(os.path.abspath(folder))
    if not os.path.lexists(target):
        return target
    if not target.is_dir() or target.is_symlink():
        raise DysurgeryError(f"{target} is in the way: it exists and is no folder")
    foreign = sorted(entry.name for entry in target.iterdir() if entry.name not in (CONFIG, WEIGHTS))
    if foreign:
        raise DysurgeryError(f"{target} holds other files ({', '.join(foreign[:3])}), which replacing it would lose")
    if not force:
        raise DysurgeryError(f"{target} exists already: choose another folder, or replace it with --force (force=True)")
    return target


def read_config(folder: str | os.PathLike[str]) -> Config:
    """Read the config of a saved folder.

    Raises:
        DysurgeryError: if there is none, or it is damaged or of a newer format.
    """
    path = Path(folder) / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DysurgeryError(f"{folder} is no saved model: it has no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise DysurgeryError(f"{path} cannot be read: {error}") from error
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(data, dict) or found not in READABLE:
        newer = ", which a newer version of dysurgery wrote" if isinstance(found, int) and found > FORMAT else ""
        raise DysurgeryError(f"{path} is no dysurgery config of format {FORMAT} or older (found {found!r}{newer})")
    if found < 2:
        data |= {"static": [], "biases": [], "norms": []}
    if found < 3:
        data |= {"ways": {}}
    if found < 4:
        data |= {"links": []}
    try:
        size = data["input_size"]
        return Config(
            source=None if data["source"] is None else Source.from_json(data["source"], os.path.abspath(folder)),
            layers={str(name): dict(options) for name, options in data["layers"].items()},
            static=[str(name) for name in data["static"]],
            biases=[str(name) for name in data["biases"]],
            norms=[str(name) for name in data["norms"]],
            links=[Link(*link) for link in data["links"]],
            ways={str(name): dict(ways) for name, ways in data["ways"].items()},
            graphs=dict(data["graphs"]),
            tau=data["tau"],
            input_size=None if size is None else (int(size[0]), int(size[1]), int(size[2])),
            preprocessing=dict(data["preprocessing"]),
            report=dict(data["report"]),
            versions=dict(data["versions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DysurgeryError(f"{path} is damaged: {type(error).__name__} {error}") from error


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Return the model saved in ``folder``, in eval mode, in the types it was saved in, on the CPU.

    Nothing is unpickled. A folder whose source is ``FILE.py:FACTORY`` runs that file, as any import would: load such
    folders only from people whose code you would run. Of a repository of the hub no code is run.

    Args:
        folder: what :func:`save` wrote, or ``hf-hub:user/repo[@revision]`` that :func:`dysurgery.push_to_hub` did.
        model: the static network, for a folder that does not know its source; it is used up.

    Raises:
        DysurgeryError: if the folder is damaged, its source cannot be built, or the tensors do not fit.
        UsageError: if the folder does not know its source and no model is passed.
    """
    place = saved_folder(folder) or Path(folder)
    config = read_config(place)
    if _on_hub(folder):
        config = _without_code(config, str(folder))
    with torch.random.fork_rng(devices=[]):
        if model is None:
            if config.source is None:
                raise UsageError(
                    f"{folder} holds a model of one's own, which it cannot build: load(folder, model=the static model)"
                )
            model = models.rebuild(config.source)
        model = _with_layers(model, config, folder)
    load_into(model, place)
    return model.eval()


def _on_hub(spec: str | os.PathLike[str]) -> bool:
    return re.match("hf[-_]hub:", str(spec)) is not None


def saved_folder(spec: str | os.PathLike[str]) -> Path | None:
    """Return the folder that ``spec`` names, that of the cache for a repository of the hub; None if it holds no model.

    Raises:
        DysurgeryError: if the hub is needed and cannot be had.
    """
    if not _on_hub(spec):
        return Path(spec) if (Path(spec) / CONFIG).is_file() else None
    repository = str(spec).partition(":")[2]
    try:
        config = hub_file(repository, [CONFIG])
        found = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"format", "layers", "versions"} <= found.keys():
            return None  # of timm, or of another kind
        # The folder of the cache is named after the commit: both files have to be of the same.
        hub_file(f"{repository.partition('@')[0]}@{config.parent.name}", [WEIGHTS])
    except FetchError as reason:
        raise DysurgeryError(f"{spec} cannot be loaded: {reason}") from reason
    except (OSError, ValueError) as error:
        raise DysurgeryError(f"{spec} cannot be loaded: its {CONFIG} cannot be read: {error}") from error
    return config.parent


def _without_code(config: Config, spec: str) -> Config:
    """Return the config of a stranger's repository, which may name no code and no file to load."""
    source = config.source
    if source is None or source.kind == "file":
        return replace(config, source=None)
    if own := [name for name in source.args if name in models.OWN_ARGUMENTS and name != "pretrained_cfg"]:
        raise DysurgeryError(f"{spec} is not loaded: its config asks for {own[0]}, which no repository should")
    return config


def load_into(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load the tensors saved in ``folder`` into ``model``, in the types they were saved in.

    Raises:
        DysurgeryError: if they do not fit.
    """
    weights = Path(folder) / WEIGHTS
    try:
        tensors = safetensors.torch.load_file(str(weights))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data = tensor.data.to(tensors[name].dtype if name in tensors else tensor.dtype)
        model.load_state_dict(with_metadata(_complete(tensors, model), model))
    except FileNotFoundError as error:
        raise DysurgeryError(f"{folder} is incomplete: it has no {WEIGHTS}") from error
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise DysurgeryError(f"{weights} does not fit the model of {CONFIG}: {error}") from error


def _complete(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file with the other names of those that have several, which are written once."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    return tensors | {
        name: tensors[held] for each in names.values() for held in each if held in tensors for name in each
    }


def _with_layers(model: nn.Module, config: Config, folder: str | os.PathLike[str]) -> nn.Module:
    """Put fresh layers where the config says: dynamic, static again, with a bias, without their BatchNorm."""

    def build(static: nn.Module, path: str) -> nn.Module:
        static = folded(static)
        if path in config.static:
            static = _counterpart(static, path).like(static, k=1).train(static.training).to_static()
        if path in config.layers:
            static = _counterpart(static, path).like(static, **config.layers[path]).train(static.training)
            if path in config.static:  # and dynamic for the second time
                vars(static)[WAS_DYNAMIC] = True
        return static

    def _counterpart(static: nn.Module, path: str) -> type[DynamicLayer]:
        counterpart = handler(static)
        if counterpart is None:
            raise DysurgeryError(f"{folder} does not fit: {path} is a {type(static).__name__}, no convolution")
        return counterpart

    def check(paths: Iterable[str]) -> None:
        known = dict(model.named_modules(remove_duplicate=False))
        for path in paths:
            if path not in known:
                raise DysurgeryError(f"{folder} does not fit: the model has no {path!r}{did_you_mean(path, known)}")

    replaced = [*dict.fromkeys([*config.layers, *config.static])]
    if config.graphs:
        fixed = {path: how["fixed"] for path, how in config.graphs.items()}
        linear = any(how["linear"] for how in config.graphs.values())
        try:
            model = rewrite_graphs(model, fixed, replaced, build, linear=linear)
        except AttributeError as error:
            raise DysurgeryError(f"{folder} does not fit the model that its source builds: {error}") from error
    else:
        check(replaced)
        # A model that is itself one layer has no parent to put another one into.
        model = graft(model, replaced, build) if "" in replaced else graft_in_place(model, replaced, build)[0]
    check([*config.biases, *config.norms])
    for path in config.biases:
        add_bias(model.get_submodule(path))
    model = graft_in_place(model, config.norms, lambda norm, path: FusedNorm(norm))[0]
    check([*config.ways, *(path for link in config.links for path in link if path is not None)])
    try:
        connect(model, config.links)
        set_ways(model, config.ways)
    except ValueError as error:
        raise DysurgeryError(f"{folder} is damaged: {error}") from error
    return model


def open_model(
    spec: str,
    *,
    weights: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> models.BuiltModel:
    """Open a saved folder (``hf-hub:user/repo`` too), or build what :func:`dysurgery.models.build` knows by that name.

    Raises:
        UsageError: for an unknown name, or arguments that a saved folder does not take.
        DysurgeryError: if it cannot be had.
    """
    folder = saved_folder(spec) if _on_hub(spec) else Path(spec)
    if folder is None or not folder.is_dir() or ((os.sep not in spec) and not (folder / CONFIG).exists()):
        return models.build(spec, weights=weights, model_args=model_args, input_size=input_size, seed=seed)
    if weights is not None or model_args:
        raise UsageError(f"{spec} is a saved folder, which has its own weights and arguments")
    config = read_config(folder)
    size = input_size or config.input_size or (3, 224, 224)
    label, source = folder.resolve().name, config.source
    if _on_hub(spec):
        label, source = spec.partition("@")[0].rpartition("/")[2], _without_code(config, spec).source
    return models.BuiltModel(load(spec), source, label, size, config.preprocessing)
