"""``dysurgery finetune``: train a converted network beside its control and say which is better."""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import click
from dysurgery.cli import tables
from dysurgery.cli.options import KeyValue, model_options, output_options, write_json
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dysurgery.checkpoint import open_model
from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.files import read_json
from dysurgery.models import BuiltModel
from dysurgery.nn import DynamicLayer
from dysurgery.planfile import surgery
from dysurgery.train import Epoch, Interrupted, Observer, Recipe, Step, finetune, load_recipe
from dysurgery.train.experiment import RUN, read_run
from dysurgery.train.recipe import recipe_from


class _Seeds(click.ParamType[tuple[int, ...]]):
    name = "N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdigit() for part in parts):
            self.fail(f"{value!r} is no list of seeds such as 0,1,2", param, ctx)
        return tuple(int(part) for part in parts)


@click.command(name="finetune")
@model_options(required=False)
@click.option("--data", metavar="DATA", help="A folder with train/ and val/, digits, or a data set of timm.")
@click.option("--recipe", "name", metavar="NAME|FILE.toml", help="An installed recipe or one's own; default: folder.")
@click.option(
    "--set", "overrides", multiple=True, type=KeyValue(), help="Replace a value, e.g. finetune.lr=0.02 (repeatable)."
)
@click.option("--plan", "plan_file", metavar="FILE", help="Which layers, from plan --json; goes before [surgery].")
@click.option("--weights", metavar="pretrained|random|FILE", help="As for convert.")
@click.option("--out", metavar="RUN", help="A folder that keeps the run, so that it can go on and be looked at.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out; no other option is needed.")
@click.option("--control/--no-control", default=None, help="Train the static network in the same way (default).")
@click.option("--seeds", type=_Seeds(), default=(), help="Repeat everything with these seeds; reports mean and spread.")
@click.option("--device", help="cpu or cuda; by default a GPU if there is one.")
@click.option(
    "--save-seconds", default=300.0, show_default=True, help="Time between states within an epoch; 0: every step."
)
@output_options
def finetune_command(
    model: str | None,
    data: str | None,
    name: str | None,
    overrides: tuple[tuple[str, Any], ...],
    plan_file: str | None,
    weights: str | None,
    out: str | None,
    resume: bool,
    control: bool | None,
    seeds: tuple[int, ...],
    device: str | None,
    save_seconds: float,
    json_file: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Convert MODEL, train it with tau going down, and its control beside it.

    MODEL is a timm name, torchvision:NAME, FILE.py:FACTORY or a saved folder; the control is the static network,
    trained on for as many epochs in the same way. dysurgery finetune --recipe digits does it all on real images in
    less than a minute, offline.
    """
    if resume and out is None:
        raise UsageError("to resume a run, say in which folder it is: --out RUN --resume")
    if plan_file is not None:
        overrides += tuple((f"surgery.{key}", value) for key, value in surgery(read_json(plan_file)).items())
    origin: dict[str, Any] = {}
    recipe: Recipe | None = None
    if resume and (Path(str(out)) / RUN).exists():
        known = read_run(str(out))
        origin = known["origin"]
        if name is None and not overrides:
            kept = known["run"]["recipe"]
            recipe = recipe_from({k: v for k, v in kept.items() if k != "name"}, kept["name"])
        data = origin.get("data") if data is None else data
        seeds = seeds or tuple(known["run"]["seeds"])
        control = known["run"]["control"] if control is None else control
        if model is None:
            model, weights = origin.get("model"), weights or origin.get("weights")
            options = {"model_args": origin.get("model_args", {}), "input_size": origin.get("input_size")}
            options["input_size"] = options["input_size"] and tuple(options["input_size"])
    recipe = recipe or load_recipe(name or "folder", dict(overrides))
    if model is None and recipe.model is None:
        raise UsageError("say which MODEL to fine-tune: a timm name, torchvision:NAME, FILE.py:FACTORY or a folder")
    if data is None and recipe.data is None:
        raise UsageError(f"say which data to fine-tune on: --data FOLDER (the recipe {recipe.name} names none)")
    seeds = seeds or (recipe.seed,)
    if not Path(model or "").is_dir():
        options["model_args"] = {**recipe.model_args, **dict(options["model_args"])}
    built = _open(model or str(recipe.model), weights, options, recipe, seeds[0], quiet)
    if plan_file is not None and any(isinstance(module, DynamicLayer) for module in built.model.modules()):
        raise UsageError(f"{built.label} is dynamic already: --plan is for the static network")
    origin = {
        "model": _absolute(model or recipe.model),
        "weights": _absolute(weights),
        "data": _absolute(data or recipe.data),
        "model_args": dict(options["model_args"]),
        "input_size": options["input_size"],
    }
    first = int(os.environ.get("RANK", "0")) == 0
    stop = _Stop()
    progress = _Progress(quiet or not first or not sys.stderr.isatty(), plain=not quiet and first)
    with stop.listening(), progress:
        try:
            outcome = finetune(
                built,
                data,
                recipe,
                out=out,
                resume=resume,
                control=control,
                seeds=seeds,
                device=device,
                save_seconds=save_seconds,
                origin=origin,
                asked_to_stop=lambda: stop.signal is not None,
                observer=progress,
            )
        except Interrupted as error:
            raise _Stopped(f"{error}{_how_to_go_on(out)}", stop.signal) from error
        except DysurgeryError as error:
            kept = out is not None and (Path(out) / RUN).exists() and not isinstance(error, UsageError)
            raise type(error)(f"{error}{_how_to_go_on(out) if kept else ''}") from error
    if not first:
        return
    tables.outcome_table(tables.console(quiet or json_file == "-"), recipe.name, outcome)
    if out is not None:
        tables.console(quiet or json_file == "-").print(f"The run is in {out}: curves.png, history.jsonl, dynamic/")
    write_json({"recipe": asdict(recipe), **outcome.to_json()}, json_file)


def _open(
    spec: str, weights: str | None, options: dict[str, Any], recipe: Recipe, seed: int, quiet: bool
) -> BuiltModel:
    if recipe.pretrain is not None and not Path(spec).is_dir():
        if weights not in (None, "random"):
            raise UsageError("a recipe with [pretrain] begins with random weights: leave out --weights")
        weights = "random"
    with tables.working(f"building {spec}", quiet):
        return open_model(
            spec,
            weights=weights,
            model_args=dict(options["model_args"]),
            input_size=options["input_size"],
            seed=seed,
        )


def _absolute(given: str | None) -> str | None:
    """Return the name of a file or folder so that it is found from anywhere; any other name as it is."""
    path, colon, factory = (given or "").rpartition(":")
    if path.endswith(".py"):
        return f"{os.path.abspath(path)}{colon}{factory}"
    return os.path.abspath(given) if given and os.path.exists(given) else given


def _how_to_go_on(out: str | None) -> str:
    return "" if out is None else f"\nGo on with: dysurgery finetune --out {shlex.quote(out)} --resume"


class _Stopped(click.ClickException):
    """Ends the command as a signal would."""

    def __init__(self, message: str, number: int | None) -> None:
        super().__init__(message)
        self.exit_code = 128 + (number or signal.SIGINT)


class _Stop:
    """Remembers that SIGINT or SIGTERM came; a second one ends the process at once."""

    signal: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, signal.SIG_DFL)

        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Progress(Observer):
    """A bar on standard error in a terminal, a line for each epoch elsewhere."""

    def __init__(self, silent: bool, plain: bool) -> None:
        console = Console(stderr=True, quiet=silent)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, transient=True)
        self.lines = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not (silent and plain))
        self.task: TaskID | None = None

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def on_start(self, phase: str, seed: int, done: Sequence[Epoch], steps: int) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        completed = steps * len(done) / done[-1].of if done else 0
        self.task = self.bar.add_task(phase, total=steps or None, completed=completed, figures="")

    def on_step(self, step: Step) -> None:
        assert self.task is not None
        accuracy = "" if step.accuracy is None else f" acc {step.accuracy:.1f} %"
        tau = "" if step.tau is None else f" tau {step.tau:.1f}"
        figures = f"loss {step.loss:.3f}{accuracy} lr {step.lr:.2g}{tau} {step.images_per_second:.0f} img/s"
        self.bar.update(
            self.task,
            completed=step.number,
            description=f"{step.phase} seed {step.seed}, epoch {step.epoch}",
            figures=figures,
        )

    def on_epoch(self, epoch: Epoch) -> None:
        tau = "" if epoch.tau is None else f", tau {epoch.tau:.1f}"
        entropy = "" if epoch.entropy is None else f", entropy {epoch.entropy:.2f}"
        self.lines.print(
            f"{epoch.phase} seed {epoch.seed}, epoch {epoch.number}/{epoch.of}: loss {epoch.loss:.3f}, "
            f"accuracy {epoch.accuracy:.2f} %{tau}{entropy}, {epoch.images_per_second:.0f} images/s"
        )
