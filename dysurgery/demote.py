"""The way back: dynamic layers whose attention says little become static ones with their mean kernel.

With constant weights pi a dynamic layer is a static one with the kernel ``sum_k pi_k W_k``, without gate, bank and
mixing. :func:`freeze` does that to any layer; it is exact where the attention (or what the kernels make of it) is
constant, and approximate elsewhere. :func:`demote` does it where the accuracy does not mind.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dysurgery.errors import DysurgeryError, UsageError, did_you_mean
from dysurgery.example import undisturbed
from dysurgery.nn import DynamicLayer, duplicate
from dysurgery.rewrite import graft, graft_in_place

Batches = Tensor | Iterable[Any]
"""Images (B, C, H, W); or batches, each such images or a pair of them and their classes (B,)."""

DEFAULT_TOLERANCE = 0.2

# Percentages of the same number of images may differ by this though they are the same.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Demotion:
    """What :func:`demote` did.

    Attributes:
        model: the result, in eval mode.
        demoted: paths of the layers that are static now, the one that varies least first.
        kept: paths of the layers that stay dynamic, in the same order.
        one_more: what ``after`` would be with the first of those static as well; None if none is kept.
        variation: path of each layer that the images reach -> :func:`variation`, least first.
        measure: ``accuracy``, or ``agreement`` with the predictions of the model as it was, if there are no labels.
        before: that of the model as it was, in percent.
        after: that of the result.
        tolerance: that was given, in points.
        images: how many it was measured on.
    """

    model: nn.Module
    demoted: tuple[str, ...]
    kept: tuple[str, ...]
    one_more: float | None
    variation: Mapping[str, float]
    measure: str
    before: float
    after: float
    tolerance: float
    images: int


def freeze(
    model: nn.Module,
    attention: Mapping[str, Tensor] | Batches | None = None,
    *,
    layers: str | Sequence[str] = (),
    in_place: bool = False,
) -> nn.Module:
    """Return ``model`` with dynamic layers turned into static ones that have one constant mix of their kernels.

    Args:
        model: a converted network; left alone unless ``in_place``.
        attention: what the constant weights pi are: the mean over these images (see :data:`Batches`), or path of a
            layer -> weights (K,). None, and layers that have no entry or that the images do not reach, take all
            kernels equally.
        layers: paths of the layers; none means all of them.
        in_place: change ``model`` itself instead of a copy.

    Returns:
        A network of the same class with ``Conv2d``, ``Linear`` and so on where the layers were.

    Raises:
        UsageError: for a model without dynamic layers, an unknown layer, or weights of another shape.
    """
    names = _names(model)
    wanted = [_known(path, names) for path in ([layers] if isinstance(layers, str) else layers)]
    wanted = list(dict.fromkeys(wanted or names.values()))
    if isinstance(attention, Mapping):
        weights = {_known(path, names): pi for path, pi in attention.items()}
    else:
        found = {} if attention is None else attention_on(model, (images for images, _ in _pairs(attention)))
        weights = {path: pi.mean(dim=0) for path, pi in found.items()}

    def build(layer: nn.Module, path: str) -> nn.Module:
        assert isinstance(layer, DynamicLayer)
        return layer.to_static(weights.get(path))

    with torch.inference_mode(False):
        return graft_in_place(model, wanted, build)[0] if in_place else graft(model, wanted, build)


def demote(model: nn.Module, data: Batches, tolerance: float = DEFAULT_TOLERANCE) -> Demotion:
    """Turn dynamic layers into static ones as long as the accuracy on ``data`` drops by at most ``tolerance``.

    One after the other, those whose mixed kernel varies least first (:func:`variation`), until one would cost too much.
    To go on and try each of the others too would mean to pick, out of many, those that happen to suit these images.
    Even so the choice is made on them: how the result does on others is for others to say.

    Args:
        model: a converted classifier; left alone.
        data: batches that can be gone through many times: a list or a DataLoader of images and classes, see
            :data:`Batches`. Without classes the predictions of ``model`` take their place.
        tolerance: in percentage points, over all layers together.

    Raises:
        UsageError: for a model without dynamic layers, no images, classes that the model does not know, or batches
            that can be read once only.
        DysurgeryError: if the model returns no logits (B, classes).
    """
    if not 0 <= tolerance <= 100:
        raise UsageError(f"the tolerance is in percentage points, 0..100, got {tolerance}")
    if isinstance(data, Iterator):
        raise UsageError("the data are gone through many times, which a generator cannot: give a list or a DataLoader")
    pi = attention_on(model, (images for images, _ in _pairs(data)))
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, DynamicLayer)}
    varies = {path: variation(layers[path], found) for path, found in pi.items()}
    varies = dict(sorted(varies.items(), key=lambda entry: entry[1]))
    before = after = score(model, data)
    result, demoted, one_more = duplicate(model).eval(), [], None
    for path in varies:
        trial = freeze(result, {path: pi[path].mean(dim=0)}, layers=path)
        found = score(trial, data, like=model)
        if found.percent < before.percent - tolerance - _ROUNDING:
            one_more = found.percent
            break
        result, after = trial, found
        demoted.append(path)
    return Demotion(
        model=result,
        demoted=tuple(demoted),
        kept=tuple(path for path in varies if path not in demoted),
        one_more=one_more,
        variation=varies,
        measure=before.measure,
        before=before.percent,
        after=after.percent,
        tolerance=tolerance,
        images=before.images,
    )


def variation(layer: DynamicLayer, pi: Tensor) -> float:
    """Return by how much the mixed kernel of ``layer`` varies over images, relative to the mean one.

    That is ``sqrt(E |sum_k (pi_k - m_k) W_k|^2) / |sum_k m_k W_k|`` with m the mean of pi: an attention that hardly
    varies makes it small, and so do kernels that hardly differ. 0 is a static layer.

    Args:
        layer: one layer; its biases count as a part of the kernel.
        pi: (N, K) its weights for N images.
    """
    banks = [bank for bank in (layer.kernels(), layer.bias_bank) if bank is not None]
    rows = torch.cat([bank.detach().cpu().double() for bank in banks], dim=1)
    gram, mean = rows @ rows.T, pi.mean(dim=0)
    away = pi - mean
    spread = ((away @ gram) * away).sum(dim=1).mean().clamp_min(0).item()
    size = (mean @ gram @ mean).item()
    return math.sqrt(spread / size) if size else math.inf if spread else 0.0


def attention_on(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Run batches (B, C, H, W) through ``model`` in eval mode, and return the weights pi (N, K) of each dynamic layer.

    Layers that the images do not reach have no entry. The model is left as it was.

    Raises:
        UsageError: for a model without dynamic layers, or no images.
    """
    names = _names(model)
    seen: dict[str, list[Tensor]] = {path: [] for path in names.values()}
    hooks = []
    for path, found in seen.items():

        def collect(gate: nn.Module, args: Any, pi: Tensor, found: list[Tensor] = found) -> None:
            found.append(pi.detach().reshape(-1, pi.shape[-1]).double().cpu())

        hooks.append(model.get_submodule(path).get_submodule("gate").register_forward_hook(collect))
    count = 0
    try:
        with _predicting(model) as predict:
            for images in batches:
                if len(images):
                    predict(images)
                    count += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise UsageError("there are no images to measure the attention on")
    return {path: torch.cat(found) for path, found in seen.items() if found}


@dataclass(frozen=True)
class Score:
    """How many of ``images`` a network got right, in percent; ``measure`` is ``accuracy`` or ``agreement``."""

    measure: str
    percent: float
    images: int


def score(model: nn.Module, data: Batches, *, like: nn.Module | None = None) -> Score:
    """Return the accuracy of ``model`` on ``data``; where the batches have no classes, its agreement with ``like``.

    Raises:
        UsageError: for no images, or classes that the model does not know.
        DysurgeryError: if the model returns no logits (B, classes).
    """
    right = count = 0
    measure = "accuracy"
    with _predicting(model) as predict, _predicting(like or model) as original:
        for images, classes in _pairs(data):
            logits = predict(images)
            if not isinstance(logits, Tensor) or logits.shape[:-1] != images.shape[:1]:
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise DysurgeryError(
                    f"{type(model).__name__} is no classifier: expected logits (B, classes), got {found}"
                )
            if classes is None:
                measure = "agreement"
                classes = original(images).argmax(dim=1)
            elif len(classes) != len(images) or not len(classes):
                raise UsageError(f"{len(images)} images cannot have {len(classes)} classes")
            elif not 0 <= int(classes.min()) <= int(classes.max()) < logits.shape[1]:
                raise UsageError(
                    f"the data has the class {int(classes.max())}, and {type(model).__name__} knows the "
                    f"{logits.shape[1]} classes from 0 to {logits.shape[1] - 1}: give the data that it was trained for"
                )
            right += int((logits.argmax(dim=1).cpu() == classes.cpu()).sum())
            count += len(images)
    if not count:
        raise UsageError("there are no images to measure the accuracy on")
    return Score(measure, 100 * right / count, count)


@contextmanager
def _predicting(model: nn.Module) -> Iterator[Callable[[Tensor], Any]]:
    """Give a function that runs images through ``model`` in eval mode, on its device and in its type."""
    like = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    modes = {module: module.training for module in model.modules()}
    try:
        with undisturbed(model):
            model.eval()
            yield lambda images: model(images.to(like.device, like.dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _pairs(data: Batches) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield images and, where there are any, their classes."""
    for batch in [data] if isinstance(data, Tensor) else data:
        match batch:
            case Tensor():
                yield batch, None
            case [Tensor() as images, Tensor() as classes]:
                yield images, classes
            case _:
                raise UsageError(f"a batch is images or a pair of images and classes, got {type(batch).__name__}")


def _names(model: nn.Module) -> dict[str, str]:
    """Return every path of a dynamic layer -> the first path of that layer."""
    first = {id(module): path for path, module in model.named_modules() if isinstance(module, DynamicLayer)}
    if not first:
        raise UsageError("the model has no dynamic layer: convert it first (dysurgery.convert)")
    return {path: first[id(m)] for path, m in model.named_modules(remove_duplicate=False) if id(m) in first}


def _known(path: str, names: Mapping[str, str]) -> str:
    if path not in names:
        raise UsageError(f"the model has no dynamic layer {path!r}{did_you_mean(path, names)}")
    return names[path]
