"""The options that commands share, and what they become: a model, its example, and a plan."""

import ast
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from torch import Tensor

from dysurgery.checkpoint import open_model, saved_folder
from dysurgery.errors import DysurgeryError, UsageError, did_you_mean
from dysurgery.files import read_json
from dysurgery.models import BuiltModel
from dysurgery.nn import GATES, STARTS
from dysurgery.nn.bank import DEFAULT_SPREAD
from dysurgery.plan import Plan, plan
from dysurgery.planfile import edited
from dysurgery.select import KINDS, PRESETS
from dysurgery.train import Recipe, load_recipe
from dysurgery.train.experiment import dynamic_folder, read_run
from dysurgery.train.recipe import overridden, recipe_from

Command = Callable[..., Any]


class KeyValue(click.ParamType[tuple[str, Any]]):
    """``key=value``, the value as a Python literal (or TOML's true and false) where it is one, else as text."""

    name = "key=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        key, equals, text = str(value).partition("=")
        if not equals or not key.replace(".", "_").isidentifier():
            self.fail(f"{value!r} is not of the form key=value", param, ctx)
        try:
            return key, ast.literal_eval(text.title() if text in ("true", "false") else text)
        except (ValueError, SyntaxError):
            return key, text


def model_options(required: bool = True) -> Callable[[Command], Command]:
    """Add MODEL, --model-arg and --input-size."""

    def add(command: Command) -> Command:
        command = click.option(
            "--input-size", type=int, nargs=3, metavar="C H W", help="Image size; by default the model's own."
        )(command)
        command = click.option(
            "--model-arg",
            "model_args",
            multiple=True,
            type=KeyValue(),
            help="Argument of the model's factory, e.g. pad_type=same. May be repeated.",
        )(command)
        return click.argument("model", metavar="MODEL" if required else "[MODEL]", required=required)(command)

    return add


def plan_options(command: Command) -> Command:
    """Add every option that shapes a plan."""
    options = [
        click.option("--k", default=4, show_default=True, help="Number of kernels K."),
        click.option(
            "--reduction", default=4, show_default=True, help="The attention's hidden width is Cin / reduction."
        ),
        click.option(
            "--gate", type=click.Choice(list(GATES)), default="softmax", show_default=True, help="Kind of attention."
        ),
        click.option(
            "--layers",
            type=click.Choice(list(PRESETS)),
            default="all-but-first",
            show_default=True,
            help="; ".join(f"{name}: {text}" for name, text in PRESETS.items()) + ".",
        ),
        click.option("--include", multiple=True, metavar="RE", help="Only paths that match (repeatable)."),
        click.option("--exclude", multiple=True, metavar="RE", help="No path that matches (repeatable)."),
        click.option(
            "--kinds",
            default=",".join(KINDS),
            show_default=True,
            metavar="KINDS",
            help="Only these kinds, separated by commas.",
        ),
        click.option("--linear", is_flag=True, help="Linear layers too (the paper's dynamic perceptron)."),
        click.option("--fold", is_flag=True, help="Also layers under weight_norm, pruning ...: fold that for good."),
        click.option(
            "--start",
            type=click.Choice(list(STARTS)),
            help="copies: equal kernels, random attention (softmax's default); "
            "zero-sum: kernels W + e_k with sum 0, constant attention (sigmoid's default).",
        ),
        click.option(
            "--spread", default=DEFAULT_SPREAD, show_default=True, help="Size of e_k, relative to each weight's std."
        ),
        click.option("--seed", default=0, show_default=True, help="Seed of everything random."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def output_options(command: Command) -> Command:
    """Add --json and --quiet."""
    command = click.option("--quiet", is_flag=True, help="No tables, no progress.")(command)
    return click.option(
        "--json",
        "json_file",
        metavar="FILE|-",
        help="Write the figures as JSON; - is standard output, and nothing else.",
    )(command)


def numbers(text: str, option: str) -> list[int]:
    """Return the numbers in ``1,2,5``, which ``option`` was given."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} is numbers separated by commas, such as 1,2,5, got {text!r}") from None


def check_is_folder(spec: str) -> None:
    """Refuse what is no FOLDER|RUN, naming what is near.

    Raises:
        UsageError: if there is no such folder.
    """
    folder = Path(spec)
    if not folder.is_dir():
        near = [entry.name for entry in folder.parent.glob("*/")]
        raise UsageError(
            f"no folder {spec!r}{did_you_mean(folder.name, near)}: expected a network that dysurgery convert saved, or "
            "a run of dysurgery finetune"
        )


def network_of(model: str) -> tuple[str, str | None]:
    """Return where the network of a run is, and the name of the run; any other MODEL as it is, and no name."""
    place = str(dynamic_folder(model)) if Path(model).is_dir() else model
    return place, None if place == model else Path(model).resolve().name


def recipe_of(run: Path | None, overrides: Mapping[str, Any]) -> Recipe:
    """Return how data are opened: as in the run, if there is one, unless it is said otherwise."""
    if run is None:
        return load_recipe("folder", overrides)
    kept = read_run(run)["run"]["recipe"]
    name = kept.pop("name")
    return recipe_from(overridden(kept, overrides, name), name)


def open_for_figures(spec: str, options: Mapping[str, Any]) -> BuiltModel:
    """Open a model of which only the shapes matter: a name of timm or torchvision needs no weights."""
    named = not Path(spec).is_dir() and ".py:" not in spec and saved_folder(spec) is None
    weights = "random" if named else None
    return open_model(spec, weights=weights, model_args=dict(options["model_args"]), input_size=options["input_size"])


def example_of(built: BuiltModel) -> Tensor:
    """Return one image for the model, in its type and on its device."""
    like = next(built.model.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *built.input_size, generator=generator).to(like.device, like.dtype)


def make_plan(built: BuiltModel, options: Mapping[str, Any], plan_file: str | None = None) -> Plan:
    """Return the plan that the options, or the edited plan in ``plan_file``, describe."""
    example = example_of(built)
    if plan_file is None:
        names = ("k", "reduction", "gate", "layers", "include", "exclude", "linear", "fold", "start", "spread", "seed")
        kinds = [kind.strip() for kind in options["kinds"].split(",")]
        return plan(built.model, example, kinds=kinds, **{name: options[name] for name in names})
    if given := shaping_options():
        raise UsageError(f"--plan says it all: drop {given}, or edit the plan")
    return edited(built.model, example, read_json(plan_file))


def shaping_options() -> str:
    """Return the options that shape a plan and were given, separated by commas."""
    context = click.get_current_context()
    shaping = ("k", "reduction", "gate", "layers", "include", "exclude", "kinds", "linear", "fold", "start", "spread")
    given = [name for name in shaping if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return ", ".join(f"--{name}" for name in given)


def write_json(data: Mapping[str, Any], target: str | None) -> None:
    """Write ``data`` to a file, to standard output for ``-``, or nowhere for None.

    Raises:
        DysurgeryError: if the file cannot be written.
    """
    if target is None:
        return
    text = json.dumps(data, indent=2)
    if target == "-":
        click.echo(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DysurgeryError(f"cannot write {target}: {error}") from error
