"""A TOML file becomes a typed, validated :class:`Recipe`: everything that a fine-tuning run depends on.

Named recipes are installed with the package (``dysurgery.recipes``); any other is a path. An unknown key is an error.
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from dysurgery.errors import DysurgeryError, UsageError, did_you_mean
from dysurgery.nn import TemperatureSchedule
from dysurgery.nn.bank import DEFAULT_SPREAD


@dataclass(frozen=True)
class Surgery:
    """How the network is converted, see :func:`dysurgery.plan`."""

    k: int = 4
    reduction: int = 4
    gate: str = "softmax"
    layers: str = "all-but-first"
    start: str | None = None
    spread: float = DEFAULT_SPREAD


@dataclass(frozen=True)
class Training:
    """One training run.

    Attributes:
        epochs: number of passes over the training images.
        batch_size: images per step.
        opt: optimizer, by timm's name.
        lr: learning rate of everything but the banks, see :mod:`dysurgery.train.groups`.
        momentum: of SGD.
        weight_decay: of everything but the banks.
        sched: learning-rate schedule, by timm's name, stepped once per epoch.
    """

    epochs: int = 10
    batch_size: int = 64
    opt: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    sched: str = "cosine"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("lr", 0), ("momentum", 0), ("weight_decay", 0)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise UsageError(f"{name} is at least {least} and finite, got {value}")


@dataclass(frozen=True)
class Recipe:
    """A whole fine-tuning experiment.

    Attributes:
        name: for tables.
        data: what to train on; ``digits`` is the embedded data set.
        seed: of weights, data order and everything else random.
        pretrain: how the existing network is made.
        surgery: how it is converted.
        finetune: how the dynamic network and its control are trained on.
        temperature: tau over the epochs of ``finetune``.
    """

    name: str
    data: str = "digits"
    seed: int = 0
    pretrain: Training = field(default_factory=Training)
    surgery: Surgery = field(default_factory=Surgery)
    finetune: Training = field(default_factory=Training)
    temperature: TemperatureSchedule = field(default_factory=TemperatureSchedule)

    def __post_init__(self) -> None:
        if self.data != "digits":
            raise UsageError(f"unknown data {self.data!r}: expected 'digits'")


def recipe_names() -> list[str]:
    """Return the names of the installed recipes."""
    folder = resources.files("dysurgery.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe by its name, or from a .toml file.

    Args:
        name: an installed recipe, or a path that ends in .toml.
        overrides: ``section.key`` (or ``key``) -> value, replacing what the file says.

    Raises:
        UsageError: for an unknown recipe, key or section, or a value of the wrong type.
        DysurgeryError: if the file cannot be read.
    """
    if name.endswith(".toml"):
        path, label = Path(name), Path(name).stem
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DysurgeryError(f"cannot read the recipe {name}: {error.strerror}") from error
    else:
        names = recipe_names()
        if name not in names:
            hint = did_you_mean(name, names)
            raise UsageError(f"unknown recipe {name!r}: expected {', '.join(names)} or a .toml file{hint}")
        label = name
        text = resources.files("dysurgery.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the recipe {name} is no TOML: {error}") from error
    for key, value in (overrides or {}).items():
        section, _, entry = key.rpartition(".")
        table = data.setdefault(section, {}) if section else data
        if not isinstance(table, dict):
            raise UsageError(f"{section!r} is no section of the recipe {name}")
        table[entry] = value
    recipe: Recipe = _build(Recipe, {"name": label, **data}, "")
    return recipe


def _build(cls: Any, data: Mapping[str, Any], section: str) -> Any:
    """Make a dataclass out of a TOML table, refusing unknown keys and wrong types."""
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}
    where = f" in [{section}]" if section else ""
    values = {}
    for key, value in data.items():
        if key not in fields:
            raise UsageError(f"unknown key {key!r}{where}: expected {', '.join(fields)}{did_you_mean(key, fields)}")
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise UsageError(f"[{key}] is a section, got {value!r}")
            values[key] = _build(kind, value, key)
            continue
        if kind is float and type(value) is int:
            value = float(value)
        expected: Any = str if kind == (str | None) else kind
        if type(value) is not expected:
            raise UsageError(f"{key}{where} is of type {expected.__name__}, got {value!r}")
        values[key] = value
    return cls(**values)
