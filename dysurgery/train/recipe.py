"""A TOML file becomes a typed, validated :class:`Recipe`: everything that a fine-tuning run depends on.

Named recipes are installed with the package (``dysurgery.recipes``); any other is a path. Each section is a dataclass
below, its fields are the keys; an unknown key, a wrong type or a value out of range is an error.
"""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from dysurgery.calibrate import DEFAULT_BY, DEFAULT_STD, WAYS
from dysurgery.errors import DysurgeryError, UsageError, did_you_mean
from dysurgery.nn import GATES, TemperatureSchedule
from dysurgery.nn.bank import DEFAULT_SPREAD, STARTS
from dysurgery.select import PRESETS

TRAINABLE = ("all", "dynamic", "attention")
CROPS = ("rrc", "rkrc", "rkrr", "pad", "none")
CLIP_MODES = ("norm", "value", "agc")
AMP = ("none", "bf16", "fp16")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none")
VAL_PARTS = ("all", "even", "odd")


@dataclass(frozen=True)
class Surgery:
    """How the network is converted, see :func:`dysurgery.plan`.

    Attributes:
        k, reduction, gate, layers, include, exclude, linear, start, spread, fold: as there; ``finetune --plan`` sets
            them to what a plan says.
        calibrate: standard deviation that :func:`dysurgery.calibrate` gives the attention's logits before the first
            step; 0 leaves the attention as the conversion made it. Only the start ``copies`` can be calibrated.
        calibrate_by: what it lets the logits tell apart: ``random``, ``decorrelated`` or ``clusters``.
        calibration_images: number of training images for it.
    """

    k: int = 4
    reduction: int = 4
    gate: str = "softmax"
    layers: str = "all-but-first"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    linear: bool = False
    start: str | None = None
    spread: float = DEFAULT_SPREAD
    fold: bool = False
    calibrate: float = DEFAULT_STD
    calibrate_by: str = DEFAULT_BY
    calibration_images: int = 512

    def __post_init__(self) -> None:
        _at_least(self, k=1, reduction=1, spread=0, calibrate=0, calibration_images=1)
        _one_of("gate", self.gate, GATES)
        _one_of("layers", self.layers, PRESETS)
        _one_of("calibrate_by", self.calibrate_by, WAYS)
        if self.start is not None:
            _one_of("start", self.start, STARTS)


@dataclass(frozen=True)
class Training:
    """One training run.

    Attributes:
        epochs: number of passes over the training images.
        batch_size: images per optimizer step, over all processes and accumulated parts together.
        accumulate: parts in which a process computes its share of a batch, to save memory.
        train: ``all`` parameters, the ``dynamic`` layers' (banks and attention), or only the ``attention``.
        opt: optimizer, by timm's name.
        lr: learning rate of everything that has no factor of its own.
        momentum: of SGD and its like.
        weight_decay: of everything that has no factor of its own; biases and normalisation have none.
        bank_lr: factor on lr, and divisor of weight decay, of the banks; by default K under SGD and its like and 1
            under any other, see :mod:`dysurgery.train.groups`.
        attention_lr: factor on lr of the attention.
        attention_weight_decay: factor on weight_decay of the attention.
        sched: learning-rate schedule, by timm's name.
        sched_on: ``step`` moves it at every step, ``epoch`` once an epoch.
        warmup_epochs: of linear warmup from zero, part of ``epochs``.
        min_lr: where the schedule ends.
        decay_epochs: between decays of ``step``.
        decay_rate: of ``step`` and ``multistep``.
        milestones: epochs of ``multistep``.
        clip_grad: bound on the gradient; 0 is none.
        clip_mode: ``norm``, ``value`` or ``agc``, as in timm.
        label_smoothing: of the cross-entropy.
        ema_decay: of the moving average of the weights, which is then validated and saved; 0 is none.
        ema_warmup: let the decay grow to its value.
        keep: the network of the ``last`` epoch, or of the ``best`` on the validation images (which then flatter it).
        amp: ``bf16`` or ``fp16`` autocast, or ``none``.
        channels_last: memory format.
        compile: torch.compile the network.
        autotune: let each dynamic convolution go its fastest way here (:func:`dysurgery.autotune`), measured at first;
            on a CPU not with ``compile``.
        workers: processes that load images, for each training process.
    """

    epochs: int = 10
    batch_size: int = 64
    accumulate: int = 1
    train: str = "all"
    opt: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bank_lr: float | None = None
    attention_lr: float = 1.0
    attention_weight_decay: float = 1.0
    sched: str = "cosine"
    sched_on: str = "step"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    decay_epochs: float = 30.0
    decay_rate: float = 0.1
    milestones: tuple[float, ...] = ()
    clip_grad: float = 0.0
    clip_mode: str = "norm"
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    ema_warmup: bool = True
    keep: str = "last"
    amp: str = "none"
    channels_last: bool = False
    compile: bool = False
    autotune: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        _at_least(self, epochs=1, batch_size=1, accumulate=1, lr=0, momentum=0, weight_decay=0, attention_lr=0)
        _at_least(self, attention_weight_decay=0, warmup_epochs=0, min_lr=0, decay_epochs=0, decay_rate=0, clip_grad=0)
        _at_least(self, label_smoothing=0, ema_decay=0, workers=0, **({} if self.bank_lr is None else {"bank_lr": 0}))
        _one_of("train", self.train, TRAINABLE)
        _one_of("sched", self.sched, SCHEDULES)
        _one_of("sched_on", self.sched_on, ("step", "epoch"))
        _one_of("clip_mode", self.clip_mode, CLIP_MODES)
        _one_of("keep", self.keep, ("last", "best"))
        _one_of("amp", self.amp, AMP)
        for name in ("label_smoothing", "ema_decay"):
            if getattr(self, name) >= 1:
                raise UsageError(f"{name} is below 1, got {getattr(self, name)}")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise UsageError(f"warmup_epochs is below epochs, got {self.warmup_epochs:g} of {self.epochs}")
        if self.sched == "plateau" and self.sched_on == "step":
            raise UsageError("the schedule 'plateau' moves once an epoch: set sched_on = 'epoch'")


@dataclass(frozen=True)
class Augment:
    """What happens to a training image, all of it timm's; validation images are resized and cropped as usual.

    Attributes:
        crop: ``rrc`` (random resized crop), ``rkrc`` and ``rkrr`` (resize keeping the ratio, centre or random crop),
            ``pad`` (resize, pad by an eighth, random crop: the usual one for CIFAR) or ``none``.
        scale: area of the crop; empty is timm's.
        ratio: aspect ratio of the crop; empty is timm's.
        hflip, vflip: probabilities.
        color_jitter: strength of brightness, contrast and saturation.
        auto_augment: e.g. ``rand-m9-mstd0.5`` (timm's syntax).
        random_erasing: probability.
        mixup, cutmix: alpha; 0 is off.
        mixup_prob: of either being applied.
        mixup_switch: probability of cutmix if both are on.
    """

    crop: str = "rrc"
    scale: tuple[float, ...] = ()
    ratio: tuple[float, ...] = ()
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch: float = 0.5

    def __post_init__(self) -> None:
        _one_of("crop", self.crop, CROPS)
        _at_least(self, color_jitter=0, mixup=0, cutmix=0)
        for name in ("hflip", "vflip", "random_erasing", "mixup_prob", "mixup_switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is a probability, got {getattr(self, name)}")
        for name in ("scale", "ratio"):
            if len(getattr(self, name)) not in (0, 2):
                raise UsageError(f"{name} is a pair [least, most], got {list(getattr(self, name))}")


@dataclass(frozen=True)
class Temperature(TemperatureSchedule):
    """tau over the epochs of fine-tuning, see :class:`dysurgery.TemperatureSchedule`.

    Attributes:
        per: ``step`` moves tau at every step, ``epoch`` once an epoch.
    """

    per: str = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("per", self.per, ("step", "epoch"))


@dataclass(frozen=True)
class Distill:
    """Distillation from the static network as it was before, by timm's logit distillation task.

    Attributes:
        weight: of the distillation loss.
        task_weight: of the loss on labels.
        temperature: of both softmaxes.
        labels: False ignores the labels of the training images altogether.
    """

    weight: float = 1.0
    task_weight: float = 1.0
    temperature: float = 1.0
    labels: bool = True

    def __post_init__(self) -> None:
        _at_least(self, weight=0, task_weight=0)
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"the temperature of distillation is positive, got {self.temperature}")


@dataclass(frozen=True)
class Recipe:
    """A whole fine-tuning experiment.

    Attributes:
        name: for tables.
        description: one line.
        model: what is fine-tuned if the caller does not say.
        model_args: arguments of its factory; those that the caller gives go before.
        data: what to train on if the caller does not say, see :mod:`dysurgery.train.data`.
        data_dir: root folder of ``torch/...`` and other named data sets.
        train_split, val_split: names of their splits.
        download: fetch a ``torch/...`` data set that is not there.
        train_images: how many of the training images, evenly spread over them; 0 is all.
        val_part: which validation images: ``all``, every second one (``even``) or the others (``odd``), so that one
            half chooses settings and the other gives the figures.
        seed: of weights, data order and everything else random.
        pretrain: makes the existing network first, from random weights.
        surgery: how it is converted.
        finetune: how the dynamic network and its control are trained on.
        augment: what happens to the training images.
        temperature: tau over the epochs of ``finetune``.
        distill: teaches by the original network.
    """

    name: str
    description: str = ""
    model: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    download: bool = False
    train_images: int = 0
    val_part: str = "all"
    seed: int = 0
    pretrain: Training | None = None
    surgery: Surgery = field(default_factory=Surgery)
    finetune: Training = field(default_factory=Training)
    augment: Augment = field(default_factory=Augment)
    temperature: Temperature = field(default_factory=Temperature)
    distill: Distill | None = None

    def __post_init__(self) -> None:
        _at_least(self, train_images=0, seed=0)
        _one_of("val_part", self.val_part, VAL_PARTS)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        return dataclasses.asdict(self)


def recipe_names() -> list[str]:
    """Return the names of the installed recipes."""
    folder = resources.files("dysurgery.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """Return the TOML of a recipe, by its name or from a .toml file.

    Raises:
        UsageError: for an unknown recipe.
        DysurgeryError: if the file cannot be read.
    """
    if name.endswith(".toml"):
        try:
            return Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise DysurgeryError(f"cannot read the recipe {name}: {reason}") from error
    names = recipe_names()
    if name not in names:
        hint = did_you_mean(name, names)
        raise UsageError(f"unknown recipe {name!r}: expected {', '.join(names)} or a .toml file{hint}")
    return resources.files("dysurgery.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe by its name, or from a .toml file.

    Args:
        name: an installed recipe, or a path that ends in .toml.
        overrides: ``section.key`` (or ``key``) -> value, replacing what the file says.

    Raises:
        UsageError: for an unknown recipe, key or section, or a value of the wrong type or out of range.
        DysurgeryError: if the file cannot be read.
    """
    text = recipe_text(name)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the recipe {name} is no TOML: {error}") from error
    data = overridden(data, overrides or {}, name)
    return recipe_from(data, Path(name).stem if name.endswith(".toml") else name)


def overridden(data: dict[str, Any], overrides: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Replace values of a recipe, given as plain values, in place: ``section.key`` (or ``key``) -> value.

    Raises:
        UsageError: for something that is no section.
    """
    for key, value in overrides.items():
        section, _, entry = key.rpartition(".")
        table = data.setdefault(section, {}) if section else data
        if not isinstance(table, dict):
            raise UsageError(f"{section!r} is no section of the recipe {name}")
        table[entry] = value
    return data


def recipe_from(data: Mapping[str, Any], name: str) -> Recipe:
    """Build a recipe from plain values, as TOML gives them and :meth:`Recipe.to_json` returns them.

    Raises:
        UsageError: see :func:`load_recipe`.
    """
    recipe: Recipe = _build(Recipe, {"name": name, **data}, "")
    return recipe


def _build(cls: Any, data: Mapping[str, Any], section: str) -> Any:
    """Make a dataclass out of a TOML table, refusing unknown keys and wrong types."""
    kinds = typing.get_type_hints(cls)
    fields = [entry.name for entry in dataclasses.fields(cls)]
    where = f" in [{section}]" if section else ""
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in fields:
            raise UsageError(f"unknown key {key!r}{where}: expected {', '.join(fields)}{did_you_mean(key, fields)}")
        values[key] = _typed(kinds[key], value, key, where)
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{error}{where}") from error


def _typed(kind: Any, value: Any, key: str, where: str) -> Any:
    """Return ``value`` as ``kind``: a plain type, a tuple of numbers or of text, a section, or one of them or None."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UsageError(f"[{key}] is a section, got {value!r}")
        return _build(kind, value, key)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"[{key}] is a section, got {value!r}")
        return dict(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind == tuple[str, ...]:
        if not isinstance(value, list | tuple) or any(type(entry) is not str for entry in value):
            raise UsageError(f"{key}{where} is a list of texts, got {value!r}")
        return tuple(value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or any(type(entry) not in (int, float) for entry in value):
            raise UsageError(f"{key}{where} is a list of numbers, got {value!r}")
        return tuple(float(entry) for entry in value)
    if type(value) is not kind:
        raise UsageError(f"{key}{where} is of type {kind.__name__}, got {value!r}")
    return value


def _at_least(section: Any, **bounds: float) -> None:
    for name, least in bounds.items():
        value = getattr(section, name)
        if not least <= value < math.inf:
            raise UsageError(f"{name} is at least {least} and finite, got {value}")


def _one_of(name: str, value: str, expected: Any) -> None:
    if value not in expected:
        raise UsageError(f"unknown {name} {value!r}: expected {', '.join(expected)}{did_you_mean(value, expected)}")
