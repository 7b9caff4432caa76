"""``dysurgery convert``: a name becomes a saved dynamic network."""

import warnings
from pathlib import Path
from typing import Any

import click
from dysurgery.cli import tables
from dysurgery.cli.options import make_plan, model_options, output_options, plan_options, write_json

from dysurgery.checkpoint import check_target, open_model, save
from dysurgery.models import WeightsUnavailable
from dysurgery.planfile import to_json
from dysurgery.rewrite import carry_out


@click.command()
@model_options()
@plan_options
@click.option("--weights", metavar="pretrained|random|FILE", help="Default: pretrained, or what the factory returns.")
@click.option("--plan", "plan_file", metavar="FILE", help="An edited plan, from dysurgery plan --json FILE.")
@click.option("--out", metavar="DIR", help="Where to save; by default ./NAME-dyK.")
@click.option("--force", is_flag=True, help="Replace an existing saved folder.")
@output_options
def convert(
    model: str,
    weights: str | None,
    plan_file: str | None,
    out: str | None,
    force: bool,
    json_file: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Make the convolutions of MODEL dynamic, so that it computes what it did, and save the result.

    MODEL is a timm name, torchvision:NAME, FILE.py:FACTORY or a saved folder.
    """
    console = tables.console(quiet or json_file == "-")
    with tables.working(f"building {model}", quiet):
        try:
            built, unavailable = (
                open_model(
                    model,
                    weights=weights,
                    model_args=dict(options["model_args"]),
                    input_size=options["input_size"],
                    seed=options["seed"],
                ),
                None,
            )
        except WeightsUnavailable as error:
            built, unavailable = error.built, error
        planned = make_plan(built, options, plan_file)
    figures = {"model": built.label, **to_json(planned), "max_abs_diff": None, "relative_diff": None, "out": None}
    if unavailable is not None:
        tables.plan_report(console, planned, built.label)
        write_json(figures, json_file)
        raise unavailable

    target = check_target(out or f"{Path(built.label).name}-dy{planned.settings.k}", force=force)
    with warnings.catch_warnings(), tables.working(f"converting {built.label}", quiet):
        warnings.simplefilter("ignore")  # the one that there is nothing to convert, said below
        done = carry_out(planned, built.model, in_place=True)
    tables.plan_report(console, planned, built.label)
    if not planned.chosen:
        console.print(f"Nothing to convert: {planned.reasons()}. Nothing was written.")
        write_json(figures, json_file)
        return
    figures |= {"max_abs_diff": done.max_abs_diff, "relative_diff": done.relative_diff}
    save(
        done.model,
        target,
        source=built.source,
        input_size=built.input_size,
        preprocessing=built.preprocessing,
        report=figures | {"weights": weights, "size": options["input_size"], "plan": plan_file},
        force=force,
    )
    choices = f"; they are choices, which rounding alone changes by {done.rounding:.1e}" if done.rounding else ""
    console.print(
        f"Outputs on a random batch: largest difference {done.max_abs_diff:.1e}, {done.relative_diff:.1e} of the "
        f"largest output{choices}.\nSaved to {target}",
        soft_wrap=True,
    )
    write_json(figures | {"out": str(target)}, json_file)
