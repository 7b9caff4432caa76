"""``dysurgery fold``: a dynamic network for inference, with what it need not carry folded away."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from dysurgery.cli import tables
from dysurgery.cli.options import KeyValue, check_is_folder, example_of, output_options, recipe_of, write_json
from torch import nn

from dysurgery.checkpoint import check_target, open_model, read_config, save
from dysurgery.cost import cost
from dysurgery.demote import DEFAULT_TOLERANCE, Batches, Demotion, demote, freeze, score
from dysurgery.errors import UsageError
from dysurgery.fuse import Fusion, fuse
from dysurgery.latency import latency
from dysurgery.models import BuiltModel, preprocessing_of
from dysurgery.nn import DynamicLayer
from dysurgery.train import Recipe, open_data
from dysurgery.train.data import val_loader
from dysurgery.train.experiment import dynamic_folder, run_of
from dysurgery.train.head import outputs_of
from dysurgery.train.processes import join_processes


@click.command()
@click.argument("folder", metavar="FOLDER|RUN")
@click.option("--data", metavar="DATA", help="As for finetune; its validation images say what may be static again.")
@click.option("--tolerance", type=float, help=f"Points of accuracy that this may cost; by default {DEFAULT_TOLERANCE}.")
@click.option("--all", "everything", is_flag=True, help="Make every dynamic layer static, whatever it costs.")
@click.option("--no-bn", is_flag=True, help="Leave the BatchNorms alone.")
@click.option(
    "--set", "overrides", multiple=True, type=KeyValue(), help="How DATA is read, e.g. data_dir=FOLDER (repeatable)."
)
@click.option("--device", help="cpu or cuda; by default a GPU if there is one.")
@click.option("--out", metavar="DIR", help="Where to save; by default ./NAME-folded.")
@click.option("--force", is_flag=True, help="Replace an existing saved folder.")
@output_options
def fold(
    folder: str,
    data: str | None,
    tolerance: float | None,
    everything: bool,
    no_bn: bool,
    overrides: tuple[tuple[str, Any], ...],
    device: str | None,
    out: str | None,
    force: bool,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Fold the BatchNorms of a saved network into its kernels, and make layers static that need not be dynamic.

    FOLDER is what convert or dysurgery.save wrote, RUN a run of finetune. Folding BatchNorm is exact. With --data,
    dynamic layers become static ones with their mean kernel as long as the accuracy drops by at most --tolerance.
    The result is for inference; dysurgery.load opens it. (convert --fold is another matter: weight norm and pruning.)
    """
    _check_options(data, tolerance, everything, no_bn, overrides)
    path, name, recipe = _find(folder, dict(overrides))
    target = check_target(out or f"{name}-folded", force=force)
    config = read_config(path)
    with tables.working(f"loading {path}", quiet):
        built = replace(open_model(str(path)), label=name)
        place = join_processes(device).device
        model = built.model.to(place)
        example = example_of(built)
    dynamic = sum(isinstance(module, DynamicLayer) for module in model.modules())
    if not dynamic and (data or everything):
        raise UsageError(f"{path} is static already: it has no dynamic layer that --data or --all could make static")
    batches = None if data is None else _batches(data, recipe, built, config.report.get("classes"), example, place)
    with tables.working(f"folding {name}", quiet):
        steps = [_step("as it was", model, example, batches)]
        fusion = None if no_bn else fuse(model, example)
        if fusion is not None and fusion.folded:
            steps.append(_step("BatchNorm folded", fusion.model, example, batches))
        demotion, model = None, steps[-1].model
        if everything:
            steps.append(_step("all static", freeze(model, batches), example, batches))
        elif batches is not None:
            demotion = demote(model, batches, DEFAULT_TOLERANCE if tolerance is None else tolerance)
            if demotion.demoted:
                count = len(demotion.demoted)
                steps.append(_step(f"{count} layer{'s' * (count > 1)} static", demotion.model, example, batches))
        times = latency({step.name: step.model for step in steps}, example)
    console = tables.console(quiet or json_file == "-")
    tables.steps_table(console, name, steps, times)
    if fusion is not None:
        console.print(_about_norms(fusion), soft_wrap=True)
    if demotion is not None:
        tables.demotion_table(console, demotion)
    if everything:
        console.print(_about_all(dynamic, batches is not None), soft_wrap=True)
    figures = _figures(name, steps, times, fusion, demotion)
    if len(steps) > 1:
        save(
            steps[-1].model.cpu(),
            target,
            source=built.source,
            input_size=built.input_size,
            preprocessing=built.preprocessing,
            report={**config.report, "fold": figures},
            force=force,
        )
        console.print(f"Saved to {target}", soft_wrap=True)
    else:
        console.print("Nothing was written: there was nothing to fold.")
    write_json({**figures, "out": str(target) if len(steps) > 1 else None}, json_file)


def _step(name: str, model: nn.Module, example: Any, batches: Batches | None) -> tables.Step:
    accuracy = None if batches is None else score(model, batches).percent
    return tables.Step(name, model, cost(model, example), accuracy)


def _about_norms(fusion: Fusion) -> str:
    if not fusion.folded:
        return f"No BatchNorm was folded: {fusion.reasons()}."
    folded, left = len(fusion.folded), f"; {fusion.reasons()}" if fusion.left else ""
    return (
        f"{folded} of {folded + len(fusion.left)} BatchNorms folded, which is exact: the outputs on a random batch "
        f"differ by {fusion.relative_diff:.1e} of the largest{left}."
    )


def _about_all(dynamic: int, measured: bool) -> str:
    which = (
        "each has its mean kernel over these images"
        if measured
        else "each has the mean of its kernels, as without --data nothing is known of the attention"
    )
    return f"All {dynamic} dynamic layers are static, which is approximate: {which}."


def _figures(
    name: str,
    steps: Sequence[tables.Step],
    times: Mapping[str, float],
    fusion: Fusion | None,
    demotion: Demotion | None,
) -> dict[str, Any]:
    """Return the figures as plain values."""
    found: dict[str, Any] = {
        "model": name,
        "steps": [
            {
                "step": step.name,
                "accuracy": step.accuracy,
                "params": step.report.params,
                "mult_adds": step.report.mult_adds.total,
                "latency_ms": times[step.name],
            }
            for step in steps
        ],
        "batchnorms": None,
        "demotion": None,
    }
    if fusion is not None:
        found["batchnorms"] = {
            "folded": dict(fusion.folded), "left": dict(fusion.left), "relative_diff": fusion.relative_diff,
        }  # fmt: skip
    if demotion is not None:
        found["demotion"] = {
            "demoted": list(demotion.demoted), "kept": list(demotion.kept), "one_more": demotion.one_more,
            "variation": dict(demotion.variation), "tolerance": demotion.tolerance, "images": demotion.images,
        }  # fmt: skip
    return found


def _check_options(
    data: str | None, tolerance: float | None, everything: bool, no_bn: bool, overrides: Iterable[Any]
) -> None:
    if tolerance is not None and everything:
        raise UsageError("--all makes every layer static, whatever it costs: leave out --tolerance, or --all")
    if tolerance is not None and data is None:
        raise UsageError("a --tolerance is about the accuracy on --data: say which")
    if tolerance is not None and not 0 <= tolerance <= 100:
        raise UsageError(f"the tolerance is in percentage points, 0..100, got {tolerance:g}")
    if overrides and data is None:
        raise UsageError("--set says how --data is read: say which data")
    if no_bn and not everything and data is None:
        raise UsageError("with --no-bn there is nothing to do without --data or --all")


def _find(spec: str, overrides: Mapping[str, Any]) -> tuple[Path, str, Recipe]:
    """Return the saved folder, a name for the result, and the recipe that says how data are read."""
    check_is_folder(spec)
    return dynamic_folder(spec), Path(spec).resolve().name, recipe_of(run_of(spec), overrides)


def _some(classes: Sequence[str]) -> str:
    return ", ".join(classes[:3]) + (f", ... {len(classes)} in all" if len(classes) > 3 else "")


def _batches(
    name: str, recipe: Recipe, built: BuiltModel, trained_for: Sequence[str] | None, example: Any, device: Any
) -> Batches:
    """Return the validation images of the data, as the network takes them, with their classes."""
    data = open_data(name, recipe)
    if trained_for and data.classes and list(trained_for) != list(data.classes):
        raise UsageError(
            f"the classes of {name} ({_some(data.classes)}) are not those that {built.label} was trained for "
            f"({_some(trained_for)})"
        )
    outputs = outputs_of(built.model, example)
    if data.classes and len(data.classes) != outputs:
        raise UsageError(
            f"{name} has {len(data.classes)} classes and {built.label} knows {outputs}: give the data that it was "
            "trained for"
        )
    usual = preprocessing_of(built.model, built.input_size)[1]  # of a folder that says nothing
    preprocessing = {**usual, **built.preprocessing, "input_size": list(built.input_size)}
    loader: Batches = val_loader(data.val, preprocessing, 256, recipe.finetune.workers, device)
    return loader
