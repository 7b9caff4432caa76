"""``dysurgery plan``: what a conversion would do, without doing it."""

from typing import Any

import click
from dysurgery.cli import tables
from dysurgery.cli.options import (
    make_plan,
    model_options,
    open_for_figures,
    output_options,
    plan_options,
    write_json,
)

from dysurgery.planfile import to_json


@click.command()
@model_options()
@plan_options
@output_options
def plan(model: str, json_file: str | None, quiet: bool, **options: Any) -> None:
    """Show every convolution of MODEL with its decision, its reason and its predicted cost.

    Nothing is converted and no weights are needed. With --json FILE the plan can be edited by hand (each
    site's "decision") and given to convert --plan FILE. MODEL is a timm name, torchvision:NAME,
    FILE.py:FACTORY or a saved folder.
    """
    with tables.working(f"planning {model}", quiet):
        built = open_for_figures(model, options)
        planned = make_plan(built, options)
    tables.plan_report(tables.console(quiet or json_file == "-"), planned, built.label)
    write_json({"model": built.label, **to_json(planned)}, json_file)
