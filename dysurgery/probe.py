"""Is a network dynamic: what its attention does over images, and how much accuracy hangs on it.

The experiment of the paper's tables "Inspecting DY-CNN" (Chen et al., CVPR 2020, experiments on ImageNet): a trained
network is run with its weights pi replaced, in all layers, in those that see one feature-map resolution, or in one
layer alone. If the accuracy stays, the attention there does nothing. Beside it stands what pi looks like: its entropy,
how it varies over images and classes, and how far apart the K kernels are that it mixes.

The batches are read once, and each goes through the network under every intervention in turn. A shadow of the model
is run, with forward hooks on its gates; the caller's stays as it is.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from dysurgery.errors import DysurgeryError, UsageError, did_you_mean
from dysurgery.example import run, shadow
from dysurgery.models import BuiltModel, described
from dysurgery.nn import DynamicLayer
from dysurgery.train.attention import entropy_and_spread
from dysurgery.train.data import Data, open_images, val_loader, worker_errors
from dysurgery.train.recipe import Recipe

Batch = Tensor | tuple[Tensor, Tensor] | list[Tensor]
"""Images (B, C, H, W), alone or with their classes (B,)."""

LAYER_IMAGES = 512
BATCH = 128
# Pictures of images are no larger than this, so that a few hundred of them fit into memory whatever the network takes.
THUMBNAIL = 96
# A spread of pi below this is called a dead attention in a note.
QUIET = 0.01


def averaged(pi: Tensor, generator: torch.Generator) -> Tensor:
    """Spread each image's total weight evenly over the K kernels; under a softmax gate pi = 1/K."""
    return pi.mean(dim=-1, keepdim=True).expand_as(pi)


def argmax(pi: Tensor, generator: torch.Generator) -> Tensor:
    """Give each image's total weight to its largest kernel; under a softmax gate pi is one-hot."""
    largest = pi.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(pi).scatter(-1, largest, pi.sum(dim=-1, keepdim=True))


def shuffled_within(pi: Tensor, generator: torch.Generator) -> Tensor:
    """Permute each image's weights over its kernels, every image in its own random way."""
    order = torch.rand(pi.shape, generator=generator).argsort(dim=-1)
    return pi.gather(-1, order.to(pi.device))


def shuffled_across(pi: Tensor, generator: torch.Generator) -> Tensor:
    """Give each image the weights of another one of its batch: along one random cycle, so that none keeps its own."""
    order = torch.randperm(len(pi), generator=generator).to(pi.device)
    found = torch.empty_like(pi)
    found[order] = pi[order.roll(1)]
    return found


Intervention = Callable[[Tensor, torch.Generator], Tensor]

# Each takes pi (B, K) and a generator on the CPU, and returns other weights (B, K) with the same sum for each image.
INTERVENTIONS: dict[str, Intervention] = {
    "averaged": averaged,
    "argmax": argmax,
    "shuffled_within": shuffled_within,
    "shuffled_across": shuffled_across,
}

AVERAGED_ELSEWHERE = "averaged_elsewhere"
"""The learned attention in the layers of one resolution alone, averaged in all others (the paper's second table)."""


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer over the images, and its kernels.

    Attributes:
        path: of the layer.
        k: number of kernels K.
        tau: temperature.
        resolution: of the feature map that it sees, ``HxW``; ``-`` for a Linear that sees none.
        entropy: mean over images of the entropy of pi (divided by its sum), divided by log K: 1 is uniform, 0 is one
            kernel alone.
        spread: standard deviation of pi over images, averaged over the K kernels: 0 is a dead attention.
        class_spread: standard deviation of the mean pi of each class over classes, averaged over the kernels; None
            without labels or with fewer than two classes.
        distance: L2 distance of two kernels, mean over all pairs, as a multiple of the norm of the mean kernel.
        mean: (K,) mean of pi over images.
        std: (K,) standard deviation of pi over images.
        share: (K,) share of the images on which each kernel has the largest weight.
    """

    path: str
    k: int
    tau: float
    resolution: str
    entropy: float
    spread: float
    class_spread: float | None
    distance: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    share: tuple[float, ...]


@dataclass(frozen=True)
class Effect:
    """What one intervention does.

    Attributes:
        scope: where pi was replaced: in ``all`` layers, those of one ``resolution``, or one ``layer``.
        name: the resolution or the path of the layer; empty for all.
        intervention: a name in :data:`INTERVENTIONS`, or :data:`AVERAGED_ELSEWHERE`.
        images: on how many images.
        accuracy: percent; None without labels.
        change: of the accuracy, in points, against the learned attention on the same images; None without labels.
        agreement: with the classes that the learned attention predicts, percent.
    """

    scope: str
    name: str
    intervention: str
    images: int
    accuracy: float | None
    change: float | None
    agreement: float


@dataclass(frozen=True)
class ProbeReport:
    """What :func:`probe` found.

    Attributes:
        label: a name of the network, for titles.
        images: number of images.
        layer_images: the first so many of them, on which resolutions and layers were looked at one by one.
        accuracy: with the learned attention on all images, percent; None without labels.
        layer_accuracy: the same on the ``layer_images``.
        classes: names of the classes, if known.
        layers: the attention of each layer, in the order in which they run.
        effects: what each intervention does: in all layers, then by resolution, then by layer.
        notes: what a reader of the figures should know.
        pi: path of each layer -> (N, K) weights of each image with the learned attention.
        thumbnails: (n, C, h, w) the first images as bytes, small, to be shown; None if they are no pictures.
    """

    label: str
    images: int
    layer_images: int
    accuracy: float | None
    layer_accuracy: float | None
    classes: tuple[str, ...]
    layers: tuple[LayerAttention, ...]
    effects: tuple[Effect, ...]
    notes: tuple[str, ...]
    pi: dict[str, Tensor] = field(repr=False, compare=False)
    thumbnails: Tensor | None = field(repr=False, compare=False)

    @property
    def resolutions(self) -> tuple[str, ...]:
        """The feature-map resolutions, in the order of the first layer that sees each."""
        return tuple(dict.fromkeys(layer.resolution for layer in self.layers))

    @property
    def measure(self) -> str:
        """What the effects are read by: ``accuracy``, or without labels ``agreement``."""
        return "agreement" if self.accuracy is None else "accuracy"

    @property
    def learned(self) -> float:
        """The :attr:`measure` of the learned attention on all images, percent."""
        return 100.0 if self.accuracy is None else self.accuracy

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """Every (scope, name) that was looked at: all layers, resolutions, layers."""
        return tuple(dict.fromkeys((effect.scope, effect.name) for effect in self.effects))

    def difference(self, intervention: str, scope: str = "all", name: str = "") -> float:
        """Return the points of :attr:`measure` against the learned attention on the same images, see :meth:`effect`."""
        effect = self.effect(intervention, scope, name)
        return effect.agreement - 100.0 if effect.change is None else effect.change

    def effect(self, intervention: str, scope: str = "all", name: str = "") -> Effect:
        """Return one effect.

        Raises:
            KeyError: if it was not looked at.
        """
        for effect in self.effects:
            if (effect.intervention, effect.scope, effect.name) == (intervention, scope, name):
                return effect
        raise KeyError((intervention, scope, name))

    def layer(self, path: str | None = None) -> LayerAttention:
        """Return the layer at ``path``; without one, that whose attention varies most over images.

        Raises:
            UsageError: for a path that is none of the layers that were looked at.
        """
        if path is None:
            return max(self.layers, key=lambda layer: layer.spread)
        known = {layer.path: layer for layer in self.layers}
        if path not in known:
            raise unknown_layer(path, known)
        return known[path]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values, without pi and thumbnails."""
        names = ("label", "images", "layer_images", "accuracy", "layer_accuracy")
        return {
            **{name: getattr(self, name) for name in names},
            "classes": list(self.classes),
            "layers": [asdict(layer) for layer in self.layers],
            "effects": [asdict(effect) for effect in self.effects],
            "notes": list(self.notes),
        }


def probe(
    model: nn.Module | BuiltModel,
    data: str | Data | Tensor | tuple[Tensor, Tensor] | Iterable[Batch],
    *,
    images: int | None = None,
    layer_images: int = LAYER_IMAGES,
    labels: bool = True,
    batch_size: int = BATCH,
    workers: int = 0,
    seed: int = 0,
    recipe: Recipe | None = None,
    progress: Callable[[int, int | None], object] = lambda done, total: None,
) -> ProbeReport:
    """Run images through a dynamic classifier with its learned attention, and with every intervention on it.

    Args:
        model: a dynamic classifier; it is run where it is, in eval mode, and left as it was.
        data: a name or folder as :func:`dysurgery.train.data.open_images` takes it, or what that returns (its
            validation images, in random order); a tensor (N, C, H, W) of normalised images, or a pair of one with
            its classes (N,), both put in random order too; or a loader of such batches, taken as they come: attention
            is shuffled among the images of a batch, which should be of all classes.
        images: how many images at most, a random choice of ``data``; the first ones of a loader. None is all.
        layer_images: how many of them for looking at one resolution or one layer alone; 0 leaves that out.
        labels: False ignores the labels of the data: then only the agreement with the learned attention is reported.
        batch_size: images at a time, where ``data`` is no loader.
        workers: processes that read images, where ``data`` is a name.
        seed: of the choice, the order and the shuffling. The global random state stays as it was.
        recipe: how ``data`` is opened, if it is a name.
        progress: is told how many images have been run and how many will be, None if that is not known.

    Returns:
        What was found, for each layer with K > 1 that the images reach.

    Raises:
        UsageError: for a model that is not dynamic, data that do not fit it, or no images.
        DysurgeryError: if the images cannot be read or run.
    """
    if images is not None and images < 1:
        raise UsageError(f"images is at least 1, got {images}")
    if layer_images < 0 or batch_size < 2:
        raise UsageError(f"layer_images is at least 0 and batch_size 2, got {layer_images} and {batch_size}")
    if not isinstance(model, BuiltModel):
        model = described(model)
    dynamic_layers(model.model)  # before any data are opened
    if isinstance(data, str):
        data = open_images(data, recipe or Recipe(name="probe"))
    batches: Iterator[Labelled]
    count: int | None
    if isinstance(data, Data):
        labels = labels and data.labelled
        batches, count = _loaded(data, model, images, batch_size, workers, seed)
        classes, preprocessing = data.classes, model.preprocessing
    else:
        batches, count = _given(data, images, batch_size, seed)
        classes, preprocessing = (), {}
    inspection = _Inspection(model, layer_images, classes, preprocessing, seed, count, progress)
    with worker_errors():
        for some, numbers in batches:
            room = len(some) if images is None else images - inspection.images
            inspection.add(some[:room], numbers[:room] if labels and numbers is not None else None)
            if inspection.images == images:
                break
    return inspection.report()


def dynamic_layers(model: nn.Module) -> dict[str, DynamicLayer]:
    """Return path -> layer of every dynamic layer with K > 1.

    Raises:
        UsageError: if there is none.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, DynamicLayer) and layer.k > 1}
    if not layers:
        raise UsageError(
            "the model has no dynamic layer with more than one kernel: convert it first (dysurgery.convert)"
        )
    return layers


@contextmanager
def intervene(
    model: nn.Module, intervention: str, layers: Collection[str] | None = None, seed: int = 0
) -> Iterator[None]:
    """Replace pi in ``model`` within the block, by forward hooks on its gates.

    Args:
        model: a dynamic network.
        intervention: a name in :data:`INTERVENTIONS`.
        layers: paths of the layers; None is all of them.
        seed: of the shuffling.

    Raises:
        UsageError: for an unknown intervention or layer.
    """
    if intervention not in INTERVENTIONS:
        raise UsageError(
            f"unknown intervention {intervention!r}: expected one of {', '.join(INTERVENTIONS)}"
            f"{did_you_mean(intervention, INTERVENTIONS)}"
        )
    known = dynamic_layers(model)
    change, seeds = INTERVENTIONS[intervention], torch.Generator().manual_seed(seed)
    with ExitStack() as hooks:
        for path in known if layers is None else layers:
            if path not in known:
                raise unknown_layer(path, known)
            # One other image lends its weights to all layers; kernels are shuffled anew in each.
            own = seed if change is shuffled_across else _draw(seeds)
            hook = partial(_replaced, change, torch.Generator().manual_seed(own))
            handle = known[path].gate.register_forward_hook(hook)
            hooks.callback(handle.remove)
        yield


def _replaced(change: Intervention, generator: torch.Generator, gate: nn.Module, args: object, pi: Tensor) -> Tensor:
    return change(pi, generator)


def _draw(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def unknown_layer(path: str, known: Collection[str]) -> UsageError:
    """Return the error that says which layers there are instead of ``path``."""
    near = did_you_mean(path, known) or f": it has {', '.join(list(known)[:4])}{' ...' * (len(known) > 4)}"
    return UsageError(f"the network has no dynamic layer {path!r}{near}")


Labelled = tuple[Tensor, Tensor | None]


def _loaded(
    data: Data, model: BuiltModel, images: int | None, batch_size: int, workers: int, seed: int
) -> tuple[Iterator[Labelled], int]:
    """Return batches of the validation images of ``data`` in random order, and the number of images."""
    size = len(data.val)  # type: ignore[arg-type]
    if not size:
        raise UsageError(f"{data.name} has no images")
    order = np.random.default_rng(seed).permutation(size)[:images]
    preprocessing = {**model.preprocessing, "input_size": list(model.input_size)}
    some = Subset(data.val, order.tolist())
    return iter(val_loader(some, preprocessing, batch_size, workers, torch.device("cpu"))), len(order)


def _given(data: Any, images: int | None, batch_size: int, seed: int) -> tuple[Iterator[Labelled], int | None]:
    """Return batches out of tensors or a loader, and the number of images if it is known."""
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    if pair and data[1].dim() == 1 and data[0].dim() > 1:
        tensors = tuple(data)
    elif isinstance(data, Tensor):
        tensors = (data,)
    elif isinstance(data, Iterable):
        return (_batch(batch) for batch in data), None
    else:
        raise UsageError(f"no data: expected a name, a tensor of images or a loader, got {type(data).__name__}")
    if len({len(part) for part in tensors}) > 1:
        raise UsageError(f"{len(tensors[0])} images cannot have {len(tensors[1])} classes")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(tensors[0]))[:images])
    chunks = torch.split(order, batch_size)
    parts = ([part[rows] for part in tensors] for rows in chunks if len(rows))
    return ((part[0], part[1] if len(part) > 1 else None) for part in parts), len(order)


def _batch(batch: Any) -> Labelled:
    match batch:
        case Tensor():
            return batch, None
        case [Tensor() as images, Tensor() as classes]:
            return images, classes
    raise UsageError(
        f"a loader gives images (B, C, H, W), alone or with their classes (B,), got {type(batch).__name__}"
    )


@dataclass(frozen=True)
class _Change:
    """An intervention in one place, and on how many images it did what."""

    effect: Effect
    replaced: str
    paths: tuple[str, ...]
    counts: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Images, right ones, those that agree with the learned attention."""


class _Inspection:
    """What is counted while batches come in."""

    def __init__(
        self,
        model: BuiltModel,
        layer_images: int,
        classes: tuple[str, ...],
        preprocessing: dict[str, Any],
        seed: int,
        count: int | None,
        progress: Callable[[int, int | None], object],
    ) -> None:
        self.label, self.network = model.label, shadow(model.model)
        self.like = next(itertools.chain(self.network.parameters(), self.network.buffers()))
        self.all_layers = dynamic_layers(self.network)
        self.layer_images, self.class_names, self.preprocessing = layer_images, classes, preprocessing
        self.seeds, self.count, self.progress = torch.Generator().manual_seed(seed), count, progress
        self.images, self.done, self.largest = 0, 0, 0
        self.labelled: bool | None = None
        self.changes: list[_Change] = []
        self.resolutions: dict[str, str] = {}
        self.pi: dict[str, list[Tensor]] = {}
        self.right: list[Tensor] = []
        self.classes: list[Tensor] = []
        self.thumbnails: list[Tensor] | None = []

    def add(self, images: Tensor, classes: Tensor | None) -> None:
        """Run one batch under the learned attention and under every intervention."""
        if not len(images):
            return
        if self.labelled not in (None, classes is not None):
            raise UsageError("some batches have classes and some have none: give all or none of them")
        self.labelled = classes is not None
        images = images.to(self.like.device, self.like.dtype if images.is_floating_point() else images.dtype)
        learned = self._learned(images)
        if classes is not None:
            classes = self._checked(classes.to(learned.device), learned)
            self.classes.append(classes.cpu())
            self.right.append((learned.argmax(dim=1) == classes).cpu())
        if not self.changes:
            self.changes = list(self._plan())
        room = max(self.layer_images - self.images, 0)
        self._show(images[:room])
        seed = _draw(self.seeds)
        for change in self.changes:
            some = slice(None) if change.effect.scope == "all" else slice(room)
            if len(images[some]):
                self._change(change, images[some], learned[some], None if classes is None else classes[some], seed)
        self.images += len(images)
        self.largest = max(self.largest, len(images))

    def _checked(self, classes: Tensor, learned: Tensor) -> Tensor:
        """Return the classes (B,) if they can be those of ``learned`` (B, outputs)."""
        if len(classes) != len(learned):
            raise DysurgeryError(f"{len(learned)} outputs for {len(classes)} images: expected one class for each image")
        if int(classes.min()) < 0:
            raise UsageError(
                "some images have no class: leave the labels of all aside (--no-labels, labels=False), or those images"
            )
        outputs = learned.shape[1]
        number = max(len(self.class_names), int(classes.max()) + 1)
        if (self.class_names and number != outputs) or number > outputs:
            raise UsageError(
                f"the data has {number} classes and {self.label} has {outputs} outputs: give it the data that it was "
                "trained for, or leave the labels aside (--no-labels, labels=False)"
            )
        return classes

    def _learned(self, images: Tensor) -> Tensor:
        """Return the logits (B, outputs) with the learned attention, and keep its pi."""
        calls: dict[str, list[Tensor]] = {}

        def collect(path: str, gate: nn.Module, args: object, pi: Tensor) -> None:
            calls.setdefault(path, []).append(pi.detach())

        def look(path: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            axes = len(getattr(layer, "stride", ()))
            self.resolutions.setdefault(path, "x".join(map(str, args[0].shape[args[0].dim() - axes :])) or "-")

        with ExitStack() as hooks:
            for path, layer in self.all_layers.items():
                hooks.callback(layer.gate.register_forward_hook(partial(collect, path)).remove)
                hooks.callback(layer.register_forward_pre_hook(partial(look, path)).remove)
            logits = self._run(images)
        for path, found in calls.items():
            pi = torch.cat([part.reshape(len(part), 1, -1) for part in found], dim=1)
            if len(pi) % len(images):
                raise DysurgeryError(
                    f"{path} is called on {len(pi)} samples for {len(images)} images, so that nobody can say which "
                    "image has which attention"
                )
            # A layer that runs several times for one image has its mean attention.
            pi = pi.reshape(len(images), -1, pi.shape[-1]).mean(dim=1)
            self.pi.setdefault(path, []).append(pi.float().cpu())
        return logits

    def _run(self, images: Tensor) -> Tensor:
        logits = run(self.network, images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise DysurgeryError(f"{self.label} is no classifier: expected logits (B, classes), got {shape}")
        self.done += len(images)
        self.progress(self.done, self._total())
        return logits

    def _total(self) -> int | None:
        """Return how many images will be run, those of every intervention counted; None if it is not known."""
        if self.count is None or not self.changes:
            return None
        whole = sum(change.effect.scope == "all" for change in self.changes)
        return self.count * (1 + whole) + min(self.count, self.layer_images) * (len(self.changes) - whole)

    def _plan(self) -> Iterator[_Change]:
        """Yield what to do, for the layers that the first batch reached, in the order in which they ran."""
        paths = tuple(path for path in self.resolutions if path in self.pi)
        groups = {size: tuple(p for p in paths if self.resolutions[p] == size) for size in self.resolutions.values()}

        def change(scope: str, name: str, intervention: str, where: tuple[str, ...]) -> _Change:
            replaced = "averaged" if intervention == AVERAGED_ELSEWHERE else intervention
            return _Change(Effect(scope, name, intervention, 0, None, None, 0.0), replaced, where)

        for name in INTERVENTIONS:
            yield change("all", "", name, paths)
        for size, group in groups.items() if len(groups) > 1 else ():
            for name in INTERVENTIONS:
                yield change("resolution", size, name, group)
            yield change("resolution", size, AVERAGED_ELSEWHERE, tuple(p for p in paths if p not in group))
        for path in paths:
            for name in INTERVENTIONS:
                yield change("layer", path, name, (path,))

    def _change(self, change: _Change, images: Tensor, learned: Tensor, classes: Tensor | None, seed: int) -> None:
        with intervene(self.network, change.replaced, change.paths, seed):
            predicted = self._run(images).argmax(dim=1)
        change.counts[0] += len(images)
        change.counts[1] += 0 if classes is None else int((predicted == classes).sum())
        change.counts[2] += int((predicted == learned.argmax(dim=1)).sum())

    def _show(self, images: Tensor) -> None:
        """Keep small pictures of the images, if they are pictures."""
        if self.thumbnails is None or not len(images):
            return
        if images.dim() != 4 or not images.is_floating_point():
            self.thumbnails = None
            return
        pixels = images.float().cpu()
        if self.preprocessing:
            mean, std = (torch.tensor(self.preprocessing[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
            pixels = pixels * std + mean
        else:  # nobody knows how they were normalised
            low, high = pixels.aminmax()
            pixels = (pixels - low) / (high - low).clamp_min(1e-12)
        if max(pixels.shape[2:]) > THUMBNAIL:
            ratio = THUMBNAIL / max(pixels.shape[2:])
            size = [max(round(side * ratio), 1) for side in pixels.shape[2:]]
            pixels = F.interpolate(pixels, size, mode="area")
        self.thumbnails.append((pixels.clamp(0, 1) * 255).round().byte())

    def report(self) -> ProbeReport:
        """Return what was found.

        Raises:
            UsageError: if there were no images, or only batches of one.
        """
        if not self.images:
            raise UsageError("there are no images to look at")
        if self.largest < 2:
            raise UsageError("attention is shuffled among the images of a batch: give batches of two images or more")
        pi = {path: torch.cat(self.pi[path]) for path in self.resolutions if path in self.pi}
        classes = torch.cat(self.classes) if self.labelled else None
        right = torch.cat(self.right) if self.labelled else None
        layers = tuple(self._attention(path, pi[path], classes) for path in pi)
        sizes = {tuple(part.shape[1:]) for part in self.thumbnails or ()}
        return ProbeReport(
            label=self.label,
            images=self.images,
            layer_images=min(self.images, self.layer_images),
            accuracy=_percent(right),
            layer_accuracy=_percent(None if right is None else right[: self.layer_images]),
            classes=self.class_names if self.labelled else (),
            layers=layers,
            effects=tuple(self._effect(change, right) for change in self.changes if change.counts[0]),
            notes=tuple(self._notes(layers)),
            pi=pi,
            thumbnails=torch.cat(self.thumbnails or []) if len(sizes) == 1 else None,
        )

    def _attention(self, path: str, pi: Tensor, classes: Tensor | None) -> LayerAttention:
        layer, pi = self.all_layers[path], pi.double()
        entropy, spread = entropy_and_spread(pi)
        class_spread = None
        if classes is not None and len(found := torch.unique(classes)) > 1:
            means = torch.stack([pi[classes == number].mean(dim=0) for number in found])
            class_spread = float(means.std(dim=0, correction=0).mean())
        return LayerAttention(
            path=path,
            k=layer.k,
            tau=float(layer.gate.tau),
            resolution=self.resolutions[path],
            entropy=entropy,
            spread=spread,
            class_spread=class_spread,
            distance=kernel_distance(layer),
            mean=tuple(pi.mean(dim=0).tolist()),
            std=tuple(pi.std(dim=0, correction=0).tolist()),
            share=tuple(F.one_hot(pi.argmax(dim=1), layer.k).double().mean(dim=0).tolist()),
        )

    def _effect(self, change: _Change, right: Tensor | None) -> Effect:
        images, correct, agreeing = change.counts
        accuracy = None if right is None else 100 * correct / images
        learned = _percent(None if right is None else right[:images])
        return replace(
            change.effect,
            images=images,
            accuracy=accuracy,
            change=None if accuracy is None or learned is None else accuracy - learned,
            agreement=100 * agreeing / images,
        )

    def _notes(self, layers: tuple[LayerAttention, ...]) -> Iterator[str]:
        many = len(layers)
        if equal := sum(layer.distance == 0 for layer in layers):
            yield f"the kernels of {equal} of {many} layers are all equal: there no attention changes anything"
        if quiet := sum(layer.spread < QUIET for layer in layers):
            yield f"the attention of {quiet} of {many} layers hardly varies over images (spread below {QUIET:g})"
        if missed := [path for path in self.all_layers if path not in self.pi]:
            yield f"not reached by the images: {', '.join(missed[:3])}" + ", ..." * (len(missed) > 3)


def kernel_distance(layer: DynamicLayer) -> float:
    """Return the mean L2 distance of two of the K kernels, as a multiple of the norm of their mean.

    Of the kernels as they are mixed: standardised ones where the layer does that.
    """
    with torch.no_grad():
        kernels = layer.kernels().double()
        if torch.equal(kernels, kernels[:1].expand_as(kernels)):
            return 0.0  # the mean of K equal kernels differs by rounding alone
        norm = kernels.mean(dim=0).norm().clamp_min(1e-12)
        return float(torch.pdist(kernels).mean() / norm)


def _percent(right: Tensor | None) -> float | None:
    return None if right is None or not len(right) else 100 * float(right.double().mean())
