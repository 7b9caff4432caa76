"""``dysurgery plan``: what a conversion would do, without doing it; under a budget, which convolutions are worth it."""

from typing import Any

import click
from dysurgery.cli import tables
from dysurgery.cli.options import (
    KeyValue,
    make_plan,
    model_options,
    open_for_figures,
    output_options,
    plan_options,
    write_json,
)

from dysurgery.checkpoint import open_model
from dysurgery.choose import IMAGES, choose
from dysurgery.errors import UsageError
from dysurgery.planfile import to_json
from dysurgery.train import load_recipe
from dysurgery.train.processes import join_processes


@click.command()
@model_options()
@plan_options
@click.option("--budget-params", metavar="2x|20M|+3%", help="The most parameters: a multiple, a total, an addition.")
@click.option("--budget-mult-adds", metavar="1.1x|300M|+3%", help="The most Mult-Adds per image, likewise.")
@click.option("--data", metavar="DATA", help="As for finetune, or a folder of images: its training images give scores.")
@click.option(
    "--images", type=click.IntRange(min=2), default=IMAGES, show_default=True, metavar="N", help="How many of them."
)
@click.option("--labels/--no-labels", default=True, help="Without: the network's own predictions in their place.")
@click.option("--weights", metavar="pretrained|random|FILE", help="As for convert; only --data needs them.")
@click.option("--device", help="cpu or cuda; by default a GPU if there is one.")
@click.option(
    "--set", "overrides", multiple=True, type=KeyValue(), help="How DATA is read, e.g. data_dir=FOLDER (repeatable)."
)
@output_options
def plan(
    model: str,
    budget_params: str | None,
    budget_mult_adds: str | None,
    data: str | None,
    images: int,
    labels: bool,
    weights: str | None,
    device: str | None,
    overrides: tuple[tuple[str, Any], ...],
    json_file: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Show every convolution of MODEL with its decision, its reason and its predicted cost.

    Nothing is converted. Under a budget only the convolutions worth most become dynamic: by how much the images of
    --data want different kernels there, or without data by a rule of shape. With --json FILE the plan can be edited
    by hand (each site's "decision") and given to convert --plan FILE or finetune --plan FILE. MODEL is a timm name,
    torchvision:NAME, FILE.py:FACTORY or a saved folder.
    """
    budgeted = budget_params is not None or budget_mult_adds is not None
    if data is None and (overrides or weights or device or not labels):
        raise UsageError("--weights, --set, --no-labels and --device are about the images of --data: say which")
    with tables.working(f"planning {model}", quiet):
        if data is None:
            built = open_for_figures(model, options)
        else:
            args, size = dict(options["model_args"]), options["input_size"]
            built = open_model(model, weights=weights, model_args=args, input_size=size, seed=options["seed"])
            built.model.to(join_processes(device).device)
        planned = make_plan(built, options)
    choice = None
    if data is not None or budgeted:
        recipe = load_recipe("folder", dict(overrides))
        with tables.working("looking at images" if data else "choosing", quiet):
            choice = choose(
                built, planned, data, budget_params=budget_params, budget_mult_adds=budget_mult_adds, images=images,
                labels=labels, workers=recipe.finetune.workers, recipe=recipe,
            )  # fmt: skip
        planned = choice.plan
    tables.plan_report(tables.console(quiet or json_file == "-"), planned, built.label, choice)
    write_json({"model": built.label, **(to_json(planned) if choice is None else choice.to_json())}, json_file)
