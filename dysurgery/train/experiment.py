"""Does the dynamic network beat the static one that is trained on for just as long.

A network is converted, its attention calibrated on training images, and trained on with the tau warmup; beside it the
control, the same static network trained on with the same recipe, seed, images in the same order and augmentation. All
of it for every seed. A folder keeps the whole run, so that it can go on after anything:

    RUN/run.json          what is run: the recipe, the data, the digest of the model
    RUN/PHASE-state/      the last state of the phase that is being trained (before, control, dynamic)
    RUN/PHASE/            the network of a finished phase, a folder for dysurgery.load
    RUN/history.jsonl     every epoch, RUN/curves.png the same as a picture, RUN/result.json what came out

With several seeds PHASE is seed-N/PHASE.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from dysurgery import checkpoint
from dysurgery._version import __version__
from dysurgery.autotune import check_compiled
from dysurgery.calibrate import calibrate, can_calibrate
from dysurgery.cost import CostReport, cost
from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.example import shadow
from dysurgery.files import write_text
from dysurgery.latency import latency
from dysurgery.models import BuiltModel, build, described, rebuild
from dysurgery.nn import DynamicLayer, FusedNorm
from dysurgery.rewrite import convert
from dysurgery.source import Source, describe
from dysurgery.train.curves import draw_curves
from dysurgery.train.data import Data, generators_kept, open_data, spread_images, val_loader
from dysurgery.train.groups import freeze_all_but
from dysurgery.train.head import outputs_of, replace_head
from dysurgery.train.loop import Epoch, Job, Observer, Step, evaluate, train
from dysurgery.train.processes import Processes, join_processes
from dysurgery.train.recipe import Recipe, load_recipe
from dysurgery.train.state import STATE, differences

_CONVERSION = ("k", "reduction", "gate", "layers", "include", "exclude", "linear", "start", "spread", "fold")

RUN, HISTORY, CURVES, RESULT = "run.json", "history.jsonl", "curves.png", "result.json"


@dataclass(frozen=True)
class SeedOutcome:
    """What one seed found; accuracies in percent on the validation images.

    Attributes:
        seed: of everything random.
        before: accuracy of the existing network (with a fresh head, if it got one).
        converted: right after conversion and calibration; the same but for rounding. None if it came dynamic.
        control: of the static network after the further epochs; None without a control.
        dynamic: of the dynamic network after as many.
        seconds: that training took, phase by phase.
    """

    seed: int
    before: float
    converted: float | None
    control: float | None
    dynamic: float
    seconds: dict[str, float]

    @property
    def difference(self) -> float | None:
        """Dynamic minus control, in points."""
        return None if self.control is None else self.dynamic - self.control


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Attributes:
        seeds: what each seed found.
        costs: of the static network (None if the model came dynamic) and of the dynamic one.
        latency: milliseconds for one image of ``static`` and ``dynamic``, medians on this machine.
        history: every epoch of every run.
        model: the dynamic network of the last seed, in eval mode.
        control: the control of the last seed.
        val_images: number of validation images: one is 100 / val_images points.
        notes: what a reader of the figures should know.
    """

    seeds: tuple[SeedOutcome, ...]
    costs: tuple[CostReport | None, CostReport]
    latency: dict[str, float]
    history: tuple[Epoch, ...]
    model: nn.Module
    control: nn.Module | None
    val_images: int
    notes: tuple[str, ...]

    def values(self, name: str) -> list[float]:
        """Return what each seed found for ``before``, ``converted``, ``control``, ``dynamic`` or ``difference``."""
        return [value for outcome in self.seeds if (value := getattr(outcome, name)) is not None]

    def mean(self, name: str) -> float | None:
        """Return the mean over seeds of :meth:`values`; None if there are none."""
        values = self.values(name)
        return fmean(values) if values else None

    def spread(self, name: str) -> float | None:
        """Return the standard deviation over seeds of :meth:`values`; None for fewer than two."""
        values = self.values(name)
        return stdev(values) if len(values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        names = ("before", "converted", "control", "dynamic", "difference")
        static, dynamic = self.costs
        return {
            "accuracy": {name: self.mean(name) for name in names},
            "accuracy_std": {name: self.spread(name) for name in names},
            "seeds": [asdict(outcome) | {"difference": outcome.difference} for outcome in self.seeds],
            "params": {"static": static and static.params, "dynamic": dynamic.params},
            "mult_adds": {"static": static and static.mult_adds.total, "dynamic": dynamic.mult_adds.total},
            "latency_ms": self.latency,
            "val_images": self.val_images,
            "notes": list(self.notes),
            "history": [asdict(epoch) for epoch in self.history],
        }


def finetune(
    model: nn.Module | BuiltModel | str | None = None,
    data: str | Data | None = None,
    recipe: Recipe | str = "folder",
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    control: bool | None = None,
    seeds: Sequence[int] = (),
    device: str | None = None,
    save_seconds: float = 300.0,
    origin: Mapping[str, Any] | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    observer: Observer | None = None,
) -> Outcome:
    """Convert a network, fine-tune it, and train its control in the same way.

    Args:
        model: a classifier, static or converted; a name or folder as ``dysurgery convert`` takes; None is the
            recipe's. It is not changed.
        data: see :func:`dysurgery.train.data.open_data`; None is the recipe's.
        recipe: its name, a .toml file, or a :class:`Recipe`.
        out: a folder for the run; None keeps nothing.
        resume: go on with the run in ``out``.
        control: whether to train a control; by default if the model is static.
        seeds: repeat everything with each; by default the recipe's only.
        device: ``cpu``, ``cuda``; by default a GPU if there is one.
        save_seconds: between states within an epoch.
        origin: how the caller came by the model, kept in ``run.json``.
        asked_to_stop: called between steps; True saves the state and raises :class:`Interrupted`.
        observer: is told how it goes.

    Returns:
        What was found, with the trained networks. The global random state stays as it was.

    Raises:
        UsageError: for a recipe, data or options that do not go together, or a run in ``out`` that is another one.
        DysurgeryError: if something cannot be done; what the run had until then is kept.
        Interrupted: if it was asked to stop.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    seeds = tuple(seeds) or (recipe.seed,)
    if len(set(seeds)) != len(seeds):
        raise UsageError(f"a seed is there twice: {', '.join(map(str, seeds))}")
    processes = join_processes(device)
    data = open_data(_given(data, recipe.data, "data"), recipe) if not isinstance(data, Data) else data
    built = _opened(_given(model, recipe.model, "model"), recipe, seeds[0])
    experiment = _Experiment(recipe, data, built, seeds, control, processes, save_seconds, asked_to_stop, observer)
    with generators_kept(), _folder(out, resume, experiment.description(origin), processes) as folder:
        return experiment.run(folder)


def _given(value: Any, default: str | None, what: str) -> Any:
    value = default if value is None else value
    if value is None:
        raise UsageError(f"the recipe names no {what}: say which {what} to fine-tune" + (" on" * (what == "data")))
    return value


def _opened(model: nn.Module | BuiltModel | str, recipe: Recipe, seed: int) -> BuiltModel:
    """Return the model with what goes into it."""
    if isinstance(model, BuiltModel):
        return model
    if isinstance(model, str):
        weights = "random" if recipe.pretrain is not None else None
        if weights and not Path(model).is_dir():
            return build(model, weights=weights, model_args=recipe.model_args, seed=seed)
        args = None if Path(model).is_dir() else recipe.model_args
        return checkpoint.open_model(model, model_args=args, seed=seed)
    return described(model, describe(model))


@contextmanager
def _folder(
    out: str | os.PathLike[str] | None, resume: bool, description: dict[str, Any], processes: Processes
) -> Iterator[Path | None]:
    """Open the folder of a run; say in errors that it is kept, and how to go on."""
    if out is None:
        if resume:
            raise UsageError("to resume a run, say in which folder it is (--out RUN)")
        yield None
        return
    folder = Path(os.path.abspath(out))
    known = folder / RUN
    if known.exists() and not resume:
        raise UsageError(f"{folder} holds a run already: go on with it by --resume, or choose another folder")
    if resume and not known.exists():
        raise UsageError(f"{folder} holds no run to resume: it has no {RUN}")
    if resume:
        before = read_run(folder)
        changed = differences(before["run"], description["run"])
        if changed:
            raise UsageError(f"the run in {folder} is another one: {'; '.join(changed[:6])}")
    else:
        if folder.exists() and (not folder.is_dir() or any(p for p in folder.iterdir() if p.name[0] != ".")):
            raise UsageError(f"{folder} is in the way: it exists and is no empty folder")
        processes.barrier()  # all have looked before one writes
        if processes.first:
            write_text(known, json.dumps(description, indent=2) + "\n")
    processes.barrier()
    yield folder


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``run.json`` in ``folder`` says: ``run`` and ``origin``.

    Raises:
        DysurgeryError: if there is none, or it is damaged.
    """
    path = Path(folder) / RUN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"run": dict(found["run"]), "origin": dict(found["origin"]), **found}
    except FileNotFoundError as error:
        raise DysurgeryError(f"{folder} holds no run: it has no {RUN}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DysurgeryError(f"{path} is damaged: {type(error).__name__} {error}") from error


def run_of(folder: str | os.PathLike[str]) -> Path | None:
    """Return the run that ``folder`` is, or that one of its seeds or networks is in; None if there is none."""
    place = Path(folder).resolve()
    return next((each for each in (place, *place.parents[:2]) if (each / RUN).is_file()), None)


def dynamic_folder(folder: str | os.PathLike[str], *, first_seed: bool = False) -> Path:
    """Return where the dynamic network of a run is, or of one seed of it; any other folder as it is.

    Raises:
        UsageError: for a run with several seeds, which has several, unless ``first_seed`` says which.
        DysurgeryError: for a run that is not finished.
    """
    place = Path(folder)
    seeds: list[int] = read_run(place)["run"]["seeds"] if (place / RUN).is_file() else []
    if len(seeds) > 1 and first_seed:
        place = place / f"seed-{seeds[0]}"
    elif len(seeds) > 1:
        each = ", ".join(str(place / f"seed-{seed}") for seed in seeds)
        raise UsageError(f"{folder} holds a network for each of {len(seeds)} seeds: say which, {each}")
    if (place / "dynamic" / checkpoint.CONFIG).exists():
        return place / "dynamic"
    if seeds:
        raise DysurgeryError(
            f"the run in {folder} has no dynamic network yet: finish it with dysurgery finetune --out {folder} --resume"
        )
    return place


@dataclass
class _Experiment:
    recipe: Recipe
    data: Data
    built: BuiltModel
    seeds: tuple[int, ...]
    wants_control: bool | None
    processes: Processes
    save_seconds: float
    asked_to_stop: Callable[[], bool]
    observer: Observer | None

    def __post_init__(self) -> None:
        model = self.built.model
        self.came_dynamic = any(isinstance(module, DynamicLayer) for module in model.modules())
        if self.came_dynamic and self.wants_control:
            raise UsageError(
                f"{self.built.label} is dynamic already, so there is no static network for a control: give the static "
                "one, or --no-control"
            )
        if self.came_dynamic and self.recipe.pretrain is not None:
            raise UsageError("a recipe with [pretrain] begins with a static network from random weights")
        attention_only = self.recipe.finetune.train == "attention"
        if attention_only and self.wants_control:
            raise UsageError(
                "a control has nothing to train with finetune.train='attention', as the static network has none: "
                "--no-control"
            )
        check_compiled(self.processes.device, self.recipe.finetune.autotune, self.recipe.finetune.compile)
        possible = not self.came_dynamic and not attention_only
        self.with_control = possible if self.wants_control is None else self.wants_control
        self.preprocessing = {**self.built.preprocessing, "input_size": list(self.built.input_size)}
        parameter = next(model.parameters())
        self.example = torch.zeros(1, *self.built.input_size, dtype=parameter.dtype, device=parameter.device)
        self.notes: list[str] = []
        self.history: list[Epoch] = []
        outputs = outputs_of(model, self.example)
        self.classes = len(self.data.classes) or outputs
        self.new_head = self.classes != outputs
        if self.new_head and self.recipe.finetune.train != "all":
            raise UsageError(
                f"finetune.train={self.recipe.finetune.train!r} would leave the fresh head for {self.classes} classes "
                f"as random as it is (the network knows {outputs}): train 'all', then go on from that run's folder"
            )
        if self.new_head and self.recipe.distill is not None:
            raise UsageError(
                f"the original network knows {outputs} classes and the data has {self.classes}, so it cannot teach them"
            )
        tau = self.recipe.temperature(self.recipe.finetune.epochs)
        if tau != self.recipe.temperature.end:
            self.notes.append(
                f"training ends at tau = {tau:.3g}: the warmup of {self.recipe.temperature.warmup:g} epochs is longer "
                f"than its {self.recipe.finetune.epochs} epochs (temperature.warmup)"
            )
        if any(isinstance(module, FusedNorm) for module in model.modules()):
            self.notes.append(
                "the BatchNorms of this network are folded away, without which it trains badly: go on with the one "
                "that was folded, then fold the result"
            )
        if self.new_head:
            self.notes.append(f"a fresh head for {self.classes} classes in place of {outputs}: before is by chance")

    def description(self, origin: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what tells this run from another."""
        run = {
            "recipe": json.loads(json.dumps(self.recipe.to_json())),
            "data": self.data.identity,
            "images": [len(self.data.train), len(self.data.val)],  # type: ignore[arg-type]
            "classes": list(self.data.classes),
            "model": {"label": self.built.label, "sha256": _digest(self.built.model)},
            "input_size": list(self.built.input_size),
            "seeds": list(self.seeds),
            "control": self.with_control,
        }
        return {"format": 1, "dysurgery": __version__, "run": run, "origin": dict(origin or {})}

    def run(self, folder: Path | None) -> Outcome:
        recorder = _Recorder(folder if self.processes.first else None, self.recipe.name, self.observer)
        outcomes, model, control = [], self.built.model, None
        for seed in self.seeds:
            place = None if folder is None else folder / f"seed-{seed}" if len(self.seeds) > 1 else folder
            outcome, static, model, control = self._seed(seed, place, recorder)
            outcomes.append(outcome)
        images = self.example.to(self.processes.device)
        networks = {"dynamic": model} if static is None else {"static": static, "dynamic": model}
        networks = {name: network.to(self.processes.device) for name, network in networks.items()}
        found = Outcome(
            seeds=tuple(outcomes),
            costs=(None if static is None else cost(static, images), cost(model, images)),
            latency=latency(networks, images),
            history=tuple(self.history),
            model=model,
            control=control,
            val_images=len(self.data.val),  # type: ignore[arg-type]
            notes=tuple(self.notes),
        )
        if folder is not None and self.processes.first:
            write_text(folder / RESULT, json.dumps(found.to_json(), indent=2) + "\n")
        self.processes.barrier()
        return found

    def _seed(
        self, seed: int, place: Path | None, recorder: "_Recorder"
    ) -> tuple[SeedOutcome, nn.Module | None, nn.Module, nn.Module | None]:
        """Run everything with one seed; return what it found, and the static, the dynamic and the control network."""
        recipe, seconds = self.recipe, {}
        start = copy.deepcopy(self.built.model)
        source = self.built.source
        if recipe.pretrain is not None:
            start = self._fresh(seed)
        if self.new_head:
            replace_head(start, self.classes, self.example, seed)
            source = _with_classes(source, self.classes, start)
            if source is None:
                self._note("the factory takes no num_classes: load the result with dysurgery.load(FOLDER, model)")
        if recipe.pretrain is not None:
            epochs, start = self._phase("before", start, seed, place, source, recorder, recipe.pretrain)
            seconds["before"] = sum(epoch.seconds for epoch in epochs)
        before = self._accuracy(start)
        start = start.to(self.example.device)
        static = None if self.came_dynamic else start

        dynamic, converted = copy.deepcopy(start), None
        if static is not None:
            dynamic = self._converted(static, seed)
            converted = self._accuracy(dynamic)
        control, after = None, None
        if self.with_control and static is not None:
            control = copy.deepcopy(static)
            if recipe.finetune.train == "dynamic":
                freeze_all_but(control, _became_dynamic(control, dynamic))
            how = replace(recipe.finetune, train="all")  # of what is not frozen
            epochs, control = self._phase("control", control, seed, place, source, recorder, how, teacher=start)
            after, seconds["control"] = self._final(epochs), sum(epoch.seconds for epoch in epochs)
        epochs, dynamic = self._phase("dynamic", dynamic, seed, place, source, recorder, recipe.finetune, teacher=start)
        seconds["dynamic"] = sum(epoch.seconds for epoch in epochs)
        outcome = SeedOutcome(seed, before, converted, after, self._final(epochs), seconds)
        return outcome, static, dynamic, control

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _final(self, epochs: list[Epoch]) -> float:
        """Return the accuracy of the network that is kept."""
        return max(e.accuracy for e in epochs) if self.recipe.finetune.keep == "best" else epochs[-1].accuracy

    def _fresh(self, seed: int) -> nn.Module:
        """Return the architecture with the random weights of ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            source = self.built.source
            if source is None or source.kind == "file":
                raise UsageError("a recipe with [pretrain] needs a model by its name, to draw random weights for it")
            spec = {"torchvision": f"torchvision:{source.name}"}.get(source.kind, source.name)
            size = self.built.input_size
            return build(spec, weights="random", model_args=source.args, input_size=size, seed=seed).model

    def _converted(self, static: nn.Module, seed: int) -> nn.Module:
        surgery = self.recipe.surgery
        dynamic = convert(static, self.example, seed=seed, **{name: getattr(surgery, name) for name in _CONVERSION})
        if surgery.calibrate and can_calibrate(dynamic):
            calibrate(dynamic, self._calibration_images(), std=surgery.calibrate, by=surgery.calibrate_by)
        elif surgery.calibrate:
            self._note("the attention is not calibrated: that needs the softmax gate and the start 'copies'")
        return dynamic

    def _calibration_images(self) -> Iterator[Tensor]:
        count = self.recipe.surgery.calibration_images
        some = torch.utils.data.Subset(self.data.train, spread_images(self.data.train, count))
        for images, _ in val_loader(some, self.preprocessing, 64, 0, torch.device("cpu")):
            yield images.to(self.example.device, self.example.dtype)

    def _accuracy(self, model: nn.Module) -> float:
        model = shadow(model).to(self.processes.device)
        workers = self.recipe.finetune.workers
        loader = val_loader(
            self.data.val, self.preprocessing, 256, workers, self.processes.device, self.processes.rank,
            self.processes.world,
        )  # fmt: skip
        return evaluate(model, loader, self.processes)["top1"]

    def _phase(
        self,
        phase: str,
        model: nn.Module,
        seed: int,
        place: Path | None,
        source: Source | None,
        recorder: "_Recorder",
        how: Any,
        teacher: nn.Module | None = None,
    ) -> tuple[list[Epoch], nn.Module]:
        """Train one network, or take it from its folder if an earlier session finished it."""
        folder = None if place is None else place / phase
        if folder is not None and (folder / checkpoint.CONFIG).exists():
            config = checkpoint.read_config(folder)
            epochs = [Epoch(**epoch) for epoch in config.report["history"]]
            checkpoint.load_into(model, folder)
            if self.processes.first:
                shutil.rmtree(_work(folder), ignore_errors=True)
                recorder.on_start(phase, seed, epochs, 0)
            self.history += epochs
            return epochs, model.to(self.processes.device).eval()
        job = Job(
            model=model,
            data=self.data,
            preprocessing=self.preprocessing,
            how=how,
            augment=self.recipe.augment,
            phase=phase,
            seed=seed,
            temperature=self.recipe.temperature if phase == "dynamic" else None,
            distill=self.recipe.distill if phase != "before" else None,
            teacher=copy.deepcopy(teacher).eval() if teacher is not None and self.recipe.distill is not None else None,
            processes=self.processes,
            folder=None if folder is None else _work(folder),
            save_seconds=self.save_seconds,
            asked_to_stop=self.asked_to_stop,
            observer=recorder,
        )
        epochs, trained = train(job)
        if folder is not None and self.processes.first:
            checkpoint.save(
                trained,
                folder,
                source=source,
                input_size=self.built.input_size,
                preprocessing=self.preprocessing,
                report={"classes": list(self.data.classes), "history": [asdict(epoch) for epoch in epochs]},
            )
            shutil.rmtree(_work(folder), ignore_errors=True)
        self.processes.barrier()
        self.history += epochs
        return epochs, trained


def _work(folder: Path) -> Path:
    """Return where the state of a phase is while it is trained."""
    return folder.with_name(f"{folder.name}-{STATE.partition('.')[0]}")


def _with_classes(source: Source | None, classes: int, model: nn.Module) -> Source | None:
    """Return the source of ``model`` with its new head, if its factory takes ``num_classes``."""
    if source is None:
        return None
    changed = replace(source, args={**source.args, "num_classes": classes})
    try:
        twin = rebuild(changed)
    except DysurgeryError:
        return None
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in (twin, model)]
    return changed if shapes[0] == shapes[1] else None


def _became_dynamic(static: nn.Module, dynamic: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of ``static`` whose layers are dynamic in ``dynamic``."""
    for path, module in dynamic.named_modules():
        if isinstance(module, DynamicLayer):
            yield from static.get_submodule(path).parameters()


def _digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class _Recorder(Observer):
    """Writes the history of all phases down as it grows, and passes everything on."""

    def __init__(self, folder: Path | None, name: str, observer: Observer | None) -> None:
        self.folder, self.name, self.observer = folder, name, observer or Observer()
        self.history: list[Epoch] = []
        self.board = None if folder is None else _tensorboard(folder)

    def on_start(self, phase: str, seed: int, done: Sequence[Epoch], steps: int) -> None:
        self.history += done
        self._write()
        self.observer.on_start(phase, seed, done, steps)

    def on_step(self, step: Step) -> None:
        self.observer.on_step(step)

    def on_epoch(self, epoch: Epoch) -> None:
        self.history.append(epoch)
        self._write()
        if self.board is not None:
            for name, value in asdict(epoch).items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{name}/{epoch.phase}-seed{epoch.seed}", value, epoch.number)
            self.board.flush()
        self.observer.on_epoch(epoch)

    def _write(self) -> None:
        if self.folder is not None and self.history:
            write_text(self.folder / HISTORY, "".join(json.dumps(asdict(epoch)) + "\n" for epoch in self.history))
            draw_curves(self.history, self.folder / CURVES, self.name)


def _tensorboard(folder: Path) -> Any:
    """Return a writer if TensorBoard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
