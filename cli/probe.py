"""``dysurgery probe``: what the attention of a dynamic network does, and what hangs on it."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from dysurgery.cli import tables
from dysurgery.cli.options import KeyValue, check_is_folder, output_options, recipe_of, write_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dysurgery.checkpoint import open_model, read_config
from dysurgery.errors import UsageError
from dysurgery.models import BuiltModel
from dysurgery.probe import BATCH, LAYER_IMAGES, dynamic_layers, probe, unknown_layer
from dysurgery.probe_pictures import check_folder, save_pictures
from dysurgery.train import open_images
from dysurgery.train.experiment import dynamic_folder, read_run, run_of
from dysurgery.train.processes import join_processes


@click.command(name="probe")
@click.argument("folder", metavar="FOLDER|RUN")
@click.option("--data", metavar="DATA", help="As for finetune, or a folder of images; default: that of the run.")
@click.option("--images", type=click.IntRange(min=1), metavar="N", help="How many, chosen at random; default: all.")
@click.option(
    "--layer-images", type=click.IntRange(min=0), default=LAYER_IMAGES, show_default=True, metavar="N",
    help="How many of them for one layer at a time; 0 leaves that out.",
)  # fmt: skip
@click.option("--layer", metavar="PATH", help="Whose images to show; default: the layer whose attention varies most.")
@click.option("--labels/--no-labels", default=True, help="Without: agreement with the learned attention, not accuracy.")
@click.option(
    "--batch-size", type=click.IntRange(min=2), default=BATCH, show_default=True, metavar="N", help="Images at a time."
)
@click.option("--seed", default=0, show_default=True, help="Of the choice of images and the shuffling.")
@click.option(
    "--set", "overrides", multiple=True, type=KeyValue(), help="How data are opened, e.g. data_dir=DIR (repeatable)."
)
@click.option("--out", metavar="DIR", help="A folder for pictures and probe.json.")
@click.option("--device", help="cpu or cuda; by default a GPU if there is one.")
@output_options
def probe_command(
    folder: str,
    data: str | None,
    images: int | None,
    layer_images: int,
    layer: str | None,
    labels: bool,
    batch_size: int,
    seed: int,
    overrides: tuple[tuple[str, Any], ...],
    out: str | None,
    device: str | None,
    json_file: str | None,
    quiet: bool,
) -> None:
    """Say what the attention of a dynamic network does.

    FOLDER is a saved dynamic network, RUN a run of finetune. The network is run with its attention averaged over
    the kernels, reduced to its largest kernel, and shuffled within and across images: in all layers, in those of
    one feature-map resolution, and in one layer alone. What is lost is what the attention does there.
    """
    found = _find(folder)
    recipe = recipe_of(found.run, dict(overrides))
    if out is not None:
        check_folder(out)
    with tables.working(f"opening {folder}", quiet):
        built = replace(open_model(str(found.folder)), label=found.label)
        known = _dynamic(built, found)
        if layer is not None and layer not in known:
            raise unknown_layer(layer, known)
        opened = open_images(data or _data_of(found), recipe)
    trained_for = read_config(found.folder).report.get("classes") or []
    if labels and trained_for and opened.classes and list(opened.classes) != list(trained_for):
        raise UsageError(
            f"{opened.name} has other classes ({_some(opened.classes)}) than {found.label} was trained for "
            f"({_some(trained_for)}): give its own data, or leave the labels aside with --no-labels"
        )
    built.model.to(join_processes(device).device)
    with _progress(quiet or not sys.stderr.isatty()) as progress:
        report = probe(
            built, opened, images=images, layer_images=layer_images, labels=labels, batch_size=batch_size,
            workers=recipe.finetune.workers, seed=seed, progress=progress,
        )  # fmt: skip
    result = tables.console(quiet or json_file == "-")
    tables.probe_tables(result, report, opened.name)
    if out is not None:
        written = save_pictures(report, out, layer)
        result.print(f"In {out}: {', '.join(path.name for path in written)}")
    write_json({"data": opened.name, **report.to_json()}, json_file)


@dataclass(frozen=True)
class _Found:
    """A saved network, the run that it came from if there is one, and a name for it."""

    folder: Path
    run: Path | None
    label: str


def _find(folder: str) -> _Found:
    """Find the dynamic network that ``folder`` is, or is the run of: that of its first seed."""
    check_is_folder(folder)
    place, run = dynamic_folder(folder, first_seed=True).resolve(), run_of(folder)
    return _Found(place, run, place.name if run is None else str(place.relative_to(run.parent)))


def _dynamic(built: BuiltModel, found: _Found) -> list[str]:
    """Return the paths of the dynamic layers."""
    try:
        return list(dynamic_layers(built.model))
    except UsageError as error:
        raise UsageError(
            f"{found.label} is static: probe a network that dysurgery convert or finetune made dynamic (K > 1)"
        ) from error


def _some(names: Any, count: int = 3) -> str:
    return ", ".join(list(names)[:count]) + ", ..." * (len(names) > count)


def _data_of(found: _Found) -> str:
    """Return the data of the run.

    Raises:
        UsageError: if there is no run, or they are gone.
    """
    name = None
    if found.run is not None:
        known = read_run(found.run)
        name, identity = known["origin"].get("data"), str(known["run"].get("data", "folder"))
        if name is None and not identity.startswith("folder"):  # the run was made in Python
            name = identity
    if name is None:
        raise UsageError(f"say which images to look at: --data DATA ({found.label} does not say where its own are)")
    if os.path.isabs(name) and not os.path.exists(name):
        raise UsageError(f"the data of the run, {name}, are no longer there: say where they are with --data DATA")
    return str(name)


@contextlib.contextmanager
def _progress(silent: bool) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar on standard error; what it counts is images under all interventions."""
    columns = (
        TextColumn("images, every intervention counted"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=silent), transient=True) as bar:
        task = bar.add_task("probe", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
