"""``dysurgery export``: a network becomes one ONNX or torch.export file, checked where it will run."""

import dataclasses
from pathlib import Path
from typing import Any

import click
from dysurgery.cli import tables
from dysurgery.cli.options import example_of, model_options, network_of, numbers, output_options, write_json

from dysurgery.checkpoint import open_model, read_config, saved_folder
from dysurgery.deployed import timings
from dysurgery.export import BATCHES, FORMATS, check_target
from dysurgery.export import export as write_file


@click.command()
@model_options()
@click.option("--weights", metavar="pretrained|random|FILE", help="As for convert; a saved folder has its own.")
@click.option(
    "--format", "format_", type=click.Choice(list(FORMATS)), default="onnx", show_default=True, help="Kind of file."
)
@click.option("--out", metavar="FILE", help="Where to write; by default ./NAME.FORMAT.")
@click.option("--dynamic-size", is_flag=True, help="Leave open height and width, too; the batch always is.")
@click.option(
    "--batch",
    default=",".join(map(str, BATCHES)),
    show_default=True,
    metavar="N,N...",
    help="Numbers of images to check the file with.",
)
@click.option("--latency", is_flag=True, help="Measure the file beside torch, and both beside the static network.")
@click.option("--opset", type=int, metavar="N", help="Of ONNX; by default the one that torch recommends.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@output_options
def export(
    model: str,
    weights: str | None,
    format_: str,
    out: str | None,
    dynamic_size: bool,
    batch: str,
    latency: bool,
    opset: int | None,
    force: bool,
    json_file: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Write MODEL to one file for deployment, and check that the file computes the same.

    It takes any number of images. An ONNX file is run in onnxruntime, a .pt2 of torch.export in a process of
    its own. Preprocessing and the names of the classes go along. MODEL is a saved folder, a run of finetune, a
    timm name, torchvision:NAME or FILE.py:FACTORY.
    """
    console = tables.console(quiet or json_file == "-")
    batches = numbers(batch, "--batch")
    place, name = network_of(model)
    if out is not None:
        check_target(out, format_, force=force)
    with tables.working(f"building {model}", quiet):
        built = open_model(
            place, weights=weights, model_args=dict(options["model_args"]), input_size=options["input_size"]
        )
    label = name or built.label
    folder = saved_folder(place)
    classes = None if folder is None else read_config(folder).report.get("classes")
    with tables.working(f"exporting {label}", quiet):
        done = write_file(
            built.model,
            example_of(built),
            out or f"{Path(label).name}.{format_}",
            format_,
            dynamic_size=dynamic_size,
            batches=batches,
            opset=opset,
            preprocessing=built.preprocessing or None,
            classes=classes or (),
            force=force,
        )
    tables.checks_table(console, done)
    measured = ()
    if latency:
        with tables.working(f"measuring {label}", quiet):
            measured = timings(built.model, built.input_size, done)
        tables.timings_table(console, measured)
    write_json(
        {
            "model": label,
            **dataclasses.asdict(done),
            "path": str(done.path),
            "relative_diff": done.relative_diff,
            "latency": [dataclasses.asdict(timing) for timing in measured],
        },
        json_file,
    )
