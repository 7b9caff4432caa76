"""``dysurgery recipes``: look at the installed recipes, copy one, check one's own."""

import os
from pathlib import Path

import click
from dysurgery.cli import tables

from dysurgery.errors import DysurgeryError
from dysurgery.files import write_text
from dysurgery.train import load_recipe, recipe_names
from dysurgery.train.recipe import recipe_text


@click.group()
def recipes() -> None:
    """List, show, copy and check fine-tuning recipes."""


@recipes.command()
def ls() -> None:
    """List the installed recipes."""
    tables.recipes_table(tables.console(), [load_recipe(name) for name in recipe_names()])


@recipes.command()
@click.argument("name")
def cat(name: str) -> None:
    """Print the recipe NAME."""
    click.echo(recipe_text(name), nl=False)


@recipes.command()
@click.argument("name")
@click.argument("file", metavar="FILE.toml")
def cp(name: str, file: str) -> None:
    """Copy the recipe NAME to FILE.toml, to change it."""
    text = recipe_text(name)
    target = Path(file) / f"{name}.toml" if Path(file).is_dir() else Path(file)
    if target.suffix != ".toml":
        raise DysurgeryError(f"a recipe's file ends in .toml, got {file}: try {file}.toml")
    if os.path.lexists(target):
        raise DysurgeryError(f"{target} exists already: choose another name")
    write_text(target, text)
    click.echo(f"Copied to {target}; use it with dysurgery finetune --recipe {target}")


@recipes.command()
@click.argument("file", metavar="FILE.toml")
def validate(file: str) -> None:
    """Check every key and value of FILE.toml."""
    load_recipe(file)
    click.echo(f"{file} is a valid recipe")
