"""What is known about a saved network or a run of finetune, gathered in one value for people to read.

:mod:`dysurgery.page` makes a page of it, :mod:`dysurgery.hub` a model card. Nothing is measured here but the cost of
each layer, which is counted on the network itself.
"""

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dysurgery.checkpoint import CONFIG, load, read_config
from dysurgery.cost import CostReport, MultAdds, cost
from dysurgery.errors import DysurgeryError
from dysurgery.files import read_json
from dysurgery.nn import DynamicLayer
from dysurgery.nn.bank import DEFAULT_SPREAD
from dysurgery.probe_pictures import FIGURES, IMAGES
from dysurgery.probe_pictures import REPORT as PROBE
from dysurgery.select import KINDS
from dysurgery.train.experiment import CURVES, RESULT, RUN, dynamic_folder, read_run
from dysurgery.train.recipe import load_recipe


@dataclass(frozen=True)
class LayerCost:
    """A convolution as it is and as a static one; Mult-Adds per image."""

    path: str
    kind: str
    dynamic: bool
    params: tuple[int, int]
    """(static, as it is)"""
    mult_adds: tuple[int, int]


@dataclass(frozen=True)
class Report:
    """What is known; what is not is empty or None.

    Attributes:
        label: a name.
        config: of the saved network, see :class:`dysurgery.checkpoint.Config`.
        layers: every convolution, in run order.
        params: of the static counterpart and of the network.
        mult_adds: of the same.
        result: ``result.json`` of a run: accuracies, costs, latency.
        run: ``run.json`` of a run: recipe, data, seeds.
        command: that does it again.
        probe: ``probe.json`` of a probe.
        pictures: file name -> PNG: curves of the run, pictures of the probe.
        exports: what ``dysurgery export --json`` wrote.
        bench: what ``dysurgery bench --json`` wrote.
        notes: what a reader should know.
    """

    label: str
    config: Any
    layers: tuple[LayerCost, ...]
    params: tuple[int, int] | None
    mult_adds: tuple[MultAdds, MultAdds] | None
    result: Mapping[str, Any] | None
    run: Mapping[str, Any] | None
    command: str
    probe: Mapping[str, Any] | None
    pictures: Mapping[str, bytes]
    exports: tuple[Mapping[str, Any], ...]
    bench: Mapping[str, Any] | None
    notes: tuple[str, ...]


def gather(
    folder: str | os.PathLike[str],
    *,
    probe: str | os.PathLike[str] | None = None,
    exports: Sequence[str | os.PathLike[str]] = (),
    bench: str | os.PathLike[str] | None = None,
    model: nn.Module | None = None,
) -> Report:
    """Gather what is known about ``folder``.

    Args:
        folder: a saved network, or a finished run of finetune (of several seeds the layers of the first are shown).
        probe: a folder of ``dysurgery probe --out``; None looks for one inside ``folder``.
        exports: files of ``dysurgery export --json``.
        bench: a file of ``dysurgery bench --json``.
        model: the static network, for a folder that does not know its source.

    Raises:
        DysurgeryError: if it is neither, is not finished, or a file in it is damaged.
    """
    place = Path(folder)
    run, result, notes = None, None, []
    network, pictures = place, {}
    if (place / RUN).is_file():
        run = read_run(place)
        if not (place / RESULT).is_file():
            raise DysurgeryError(f"the run in {folder} is not finished: go on with finetune --out {folder} --resume")
        result = read_json(place / RESULT)
        network = dynamic_folder(place, first_seed=True)
        notes += result["notes"]
        if (place / CURVES).is_file():
            pictures[CURVES] = (place / CURVES).read_bytes()
    config = read_config(network)
    layers: tuple[LayerCost, ...] = ()
    params = mult_adds = None
    try:
        built = load(network, model)
        size = config.input_size or (3, 224, 224)
        like = next(built.parameters(), torch.empty(0))
        report = cost(built, torch.zeros(1, *size, dtype=like.dtype))
        layers = _layers(built, report)
        params = (report.params + sum(s - d for s, d in (layer.params for layer in layers)), report.params)
        mult_adds = (MultAdds(base=report.mult_adds.base), report.mult_adds)
    except DysurgeryError as error:
        notes.append(f"the cost of each layer is missing, as the network cannot be built here: {error}")
    inside = sorted(p.parent for p in place.glob(f"*/{PROBE}"))
    looked = Path(probe) if probe is not None else inside[0] if inside else None
    found = None if looked is None else read_json(looked / PROBE)
    for name in (*FIGURES, IMAGES):
        if looked is not None and (looked / name).is_file():
            pictures[name] = (looked / name).read_bytes()
    return Report(
        label=place.resolve().name,
        config=config,
        layers=layers,
        params=params,
        mult_adds=mult_adds,
        result=result,
        run=run,
        command=_command(run, config),
        probe=found,
        pictures=pictures,
        exports=tuple(read_json(each, "latency") for each in exports),
        bench=None if bench is None else read_json(bench, "rows", "machine", "layers"),
        notes=tuple(notes),
    )


def _layers(model: nn.Module, report: CostReport) -> tuple[LayerCost, ...]:
    found = []
    for site in report.sites:
        module, params = model.get_submodule(site.path), site.params
        if isinstance(module, DynamicLayer):
            params = math.prod(module.weight_shape) + (0 if module.bias_bank is None else module.out_channels)
        mult_adds = (site.mult_adds.base, site.mult_adds.total)
        found.append(LayerCost(site.path, site.kind, site.dynamic, (params, site.params), mult_adds))
    return tuple(found)


def without_places(report: Report) -> Report:
    """Return the same without the names of this machine's folders, to be published."""
    if report.run is None:
        return report
    origin = {key: os.path.basename(v) if _is_place(v) else v for key, v in report.run["origin"].items()}
    run = {**report.run, "origin": origin}
    return replace(report, run=run, command=_command(run, report.config))


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and os.path.isabs(value)


def _command(run: Mapping[str, Any] | None, config: Any) -> str:
    """Return the command that makes the network again; empty if nobody knows."""
    if run is not None:
        return _finetune_command(run)
    report, source = config.report, config.source
    if source is None or "layers" not in report or isinstance(report.get("fold"), Mapping):
        return ""
    name = f"torchvision:{source.name}" if source.kind == "torchvision" else source.name
    words = ["dysurgery", "convert", name]
    for key, value in source.args.items():
        words += ["--model-arg", f"{key}={value}"]
    if report.get("weights"):
        words += ["--weights", report["weights"]]
    if report.get("size"):
        words += ["--input-size", *map(str, report["size"])]
    if report.get("plan"):  # which says all the rest
        return shlex.join([*words, "--plan", report["plan"]])
    usual = {"k": 4, "reduction": 4, "gate": "softmax", "layers": "all-but-first", "spread": DEFAULT_SPREAD, "seed": 0}
    for key, otherwise in usual.items():
        if report.get(key, otherwise) != otherwise:
            words += [f"--{key}", str(report[key])]
    if report.get("start") not in (None, "copies" if report.get("gate") == "softmax" else "zero-sum"):
        words += ["--start", report["start"]]
    for key in ("include", "exclude"):
        for pattern in report.get(key, ()):
            words += [f"--{key}", pattern]
    if len(kinds := report.get("kinds", KINDS)) < len(KINDS):
        words += ["--kinds", ",".join(kinds)]
    words += [f"--{key}" for key in ("linear", "fold") if report.get(key) is True]
    return shlex.join(words)


def _finetune_command(run: Mapping[str, Any]) -> str:
    kept, origin, words = dict(run["run"]["recipe"]), run["origin"], ["dysurgery", "finetune"]
    name = kept.pop("name")
    try:
        usual = load_recipe(name).to_json()
    except DysurgeryError:  # a file of one's own
        name, usual = "folder", load_recipe("folder").to_json()
    usual = json.loads(json.dumps(usual))
    if origin.get("model") and origin["model"] != usual.get("model"):
        words.append(str(origin["model"]))
    if origin.get("data") and origin["data"] != usual.get("data"):
        words += ["--data", str(origin["data"])]
    if origin.get("weights"):
        words += ["--weights", str(origin["weights"])]
    words += ["--recipe", name]
    leave = {"name", "description", "model", "data", "seed", "model_args"}
    for key, value in _flat(kept).items():
        if key.partition(".")[0] not in leave and value is not None and value != _flat(usual).get(key):
            words += ["--set", f"{key}={value}"]
    for key, value in (origin.get("model_args") or {}).items():
        words += ["--model-arg", f"{key}={value}"]
    if origin.get("input_size"):
        words += ["--input-size", *map(str, origin["input_size"])]
    if not run["run"]["control"]:
        words.append("--no-control")
    return shlex.join([*words, "--seeds", ",".join(map(str, run["run"]["seeds"]))])


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def is_saved(folder: str | os.PathLike[str]) -> bool:
    """Whether there is a saved network or a run in ``folder``."""
    return any((Path(folder) / name).is_file() for name in (CONFIG, RUN))
