"""``dysurgery bench``: a dynamic network beside its static counterpart and beside what others do, measured here."""

from dataclasses import replace
from typing import Any

import click
from dysurgery.cli import tables
from dysurgery.cli.options import (
    make_plan,
    model_options,
    network_of,
    numbers,
    open_for_figures,
    output_options,
    plan_options,
    shaping_options,
    write_json,
)
from torch import nn

from dysurgery.bench import BATCHES, DTYPES, LAYOUTS, bench
from dysurgery.bench_pictures import bars, tradeoff
from dysurgery.checkpoint import saved_folder
from dysurgery.errors import UsageError
from dysurgery.files import read_json, write_atomically
from dysurgery.models import BuiltModel
from dysurgery.nn import DynamicLayer
from dysurgery.rewrite import carry_out
from dysurgery.train.experiment import RESULT, run_of
from dysurgery.train.processes import join_processes


@click.command(name="bench")
@model_options()
@plan_options
@click.option(
    "--batch", default=",".join(map(str, BATCHES)), show_default=True, metavar="N,N...", help="Images at once."
)
@click.option("--train", is_flag=True, help="Training steps, too: forward, backward, gradients cleared.")
@click.option(
    "--layout", default=",".join(LAYOUTS), show_default=True, metavar="LAYOUTS",
    help="Memory layouts from which each takes its best.",
)  # fmt: skip
@click.option("--same-layout", is_flag=True, help="Also a line for each layout with all in it.")
@click.option("--compile", is_flag=True, help="torch.compile all of them; then no layer is measured alone.")
@click.option("--autotune", is_flag=True, help="Measure each dynamic convolution first, and take its fastest way.")
@click.option("--no-layers", is_flag=True, help="Do not measure the dynamic layers one by one.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Convert all of them to it; by default as they are.")
@click.option("--device", help="cpu or cuda; by default a GPU if there is one.")
@click.option("--threads", type=int, metavar="N", help="Of torch on a CPU; by default as many as it takes.")
@click.option("--seconds", default=3.0, show_default=True, metavar="S", help="For each mode and number of images.")
@click.option("--picture", metavar="FILE.png", help="Draw the measurements as bars.")
@click.option("--tradeoff", "tradeoff_file", metavar="FILE.png", help="Draw accuracy against cost; MODEL is a run.")
@click.option(
    "--export", "exports", multiple=True, metavar="FILE",
    help="Of dysurgery export --latency --json, into --tradeoff; may be repeated.",
)  # fmt: skip
@output_options
def bench_command(
    model: str,
    batch: str,
    train: bool,
    layout: str,
    same_layout: bool,
    compile: bool,
    autotune: bool,
    no_layers: bool,
    dtype: str | None,
    device: str | None,
    threads: int | None,
    seconds: float,
    picture: str | None,
    tradeoff_file: str | None,
    exports: tuple[str, ...],
    json_file: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure MODEL as a dynamic network, as a static one, and with the grouped trick, in turns.

    MODEL is a timm name, torchvision:NAME or FILE.py:FACTORY, which is converted first and needs no weights; or a
    saved folder or a run of finetune, whose static counterpart has every dynamic layer frozen to its mean kernel.
    The grouped trick is what others do: one convolution with a group for every image. BatchNorm is folded in all of
    them for inference.
    """
    batches = numbers(batch, "--batch")
    result = _result(model) if tradeoff_file is not None else None
    if exports and tradeoff_file is None:
        raise UsageError("--export goes into the picture of --tradeoff: say where to write it")
    exported = [_exported(each, min(batches)) for each in exports]
    with tables.working(f"building {model}", quiet):
        place = join_processes(device).device
        built, static, dynamic = _networks(model, options)
    with tables.working(f"measuring {built.label}", quiet):
        found = bench(
            dynamic,
            built.input_size,
            static=static,
            batches=batches,
            train=train,
            layouts=[each.strip() for each in layout.split(",")],
            same_layout=same_layout,
            layers=not no_layers,
            compile=compile,
            autotune=autotune,
            device=place,
            dtype=None if dtype is None else DTYPES[dtype],
            threads=threads,
            seconds=seconds,
        )
    console = tables.console(quiet or json_file == "-")
    tables.bench_tables(console, built.label, found)
    figures = found.to_json(built.label)
    for file, drawn in (
        (picture, lambda: bars(figures)),
        (tradeoff_file, lambda: tradeoff(result or {}, figures, exported)),
    ):
        if file is not None:
            data = drawn()
            path = write_atomically(file, lambda out, data=data: out.write(data))
            console.print(f"Saved to {path}", soft_wrap=True)
    write_json(figures, json_file)


def _networks(model: str, options: dict[str, Any]) -> tuple[BuiltModel, nn.Module | None, nn.Module]:
    """Return what MODEL is, its static counterpart (None if that is to be made of it), and the dynamic network."""
    place, name = network_of(model)
    built = open_for_figures(place, options)
    built = replace(built, label=name or built.label)
    dynamic, given = any(isinstance(module, DynamicLayer) for module in built.model.modules()), shaping_options()
    if dynamic and given:
        raise UsageError(f"{model} is a dynamic network already: drop {given}")
    if dynamic:
        return built, None, built.model
    if saved_folder(place) is not None:
        raise UsageError(
            f"{model} is a static network that was saved, which has nothing to be compared with: give the name of a "
            "model, which is converted first, or convert it (dysurgery convert) and give the result"
        )
    planned = make_plan(built, options)
    if not planned.chosen:
        raise UsageError(f"there is nothing to convert in {built.label}: {planned.reasons()}")
    return built, built.model, carry_out(planned, built.model).model


def _result(model: str) -> dict[str, Any]:
    """Return ``result.json`` of a run, or of the run that a seed is in."""
    run = run_of(model)
    if run is not None and (run / RESULT).is_file():
        return read_json(run / RESULT)
    raise UsageError(f"--tradeoff draws the accuracies of a finished run of dysurgery finetune, which {model} is not")


def _exported(file: str, images: int) -> dict[str, Any]:
    """Return what ``dysurgery export --latency --json`` wrote, if it has a time for so many images."""
    found = read_json(file, "latency")
    measured = sorted({timing["images"] for timing in found["latency"]})
    if not measured:
        raise UsageError(f"{file} holds no latency: write it with dysurgery export --latency --json")
    if images not in measured:
        raise UsageError(
            f"{file} holds latencies for {' and '.join(map(str, measured))} images, and --tradeoff draws those for the "
            f"smallest --batch, {images}: measure --batch {measured[0]} too, as the smallest"
        )
    return found
