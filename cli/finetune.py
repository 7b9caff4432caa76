"""``dysurgery finetune``: run a recipe and say whether the dynamic network beat its control."""

import dataclasses
import sys
from typing import Any

import click
from dysurgery.cli import tables
from dysurgery.cli.options import KeyValue, output_options, write_json
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dysurgery.train import Epoch, load_recipe, run_recipe


@click.command()
@click.option("--recipe", "name", required=True, metavar="NAME|FILE.toml", help="An installed recipe, or one's own.")
@click.option(
    "--set", "overrides", multiple=True, type=KeyValue(), help="Replace a value, e.g. finetune.lr=0.02 (repeatable)."
)
@output_options
def finetune(name: str, overrides: tuple[tuple[str, Any], ...], json_file: str | None, quiet: bool) -> None:
    """Convert a network and train it on, with tau going down, beside a control.

    The control is the static network, trained on for as many epochs in the same way. dysurgery finetune
    --recipe digits does it on real images in about a minute, offline.
    """
    recipe = load_recipe(name, dict(overrides))
    epochs = recipe.pretrain.epochs + 2 * recipe.finetune.epochs
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    silent = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True, quiet=silent), transient=True) as progress:
        task = progress.add_task(recipe.name, total=epochs)

        def show(epoch: Epoch) -> None:
            tau = "" if epoch.tau is None else f", tau {epoch.tau:.1f}"
            text = f"{epoch.phase} {epoch.number}/{epoch.of}: loss {epoch.loss:.3f}, {epoch.accuracy:.1f} %{tau}"
            progress.update(task, advance=1, description=text)

        outcome = run_recipe(recipe, show)
    tables.outcome_table(tables.console(quiet or json_file == "-"), recipe.name, outcome)
    write_json(
        {
            "recipe": dataclasses.asdict(recipe),
            "accuracy": {
                key: getattr(outcome, key) for key in ("before", "converted", "control", "dynamic", "difference")
            },
            "params": dict(zip(("static", "dynamic"), (c.params for c in outcome.costs), strict=True)),
            "mult_adds": dict(zip(("static", "dynamic"), (c.mult_adds.total for c in outcome.costs), strict=True)),
            "seconds": dict(zip(("control", "dynamic"), outcome.seconds, strict=True)),
            "history": [dataclasses.asdict(epoch) for epoch in outcome.history],
        },
        json_file,
    )
