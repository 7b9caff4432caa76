"""How much different images want different kernels at a site: measured by gradients, or guessed from its shape.

``g`` is the gradient of one image's loss with respect to the kernel W. A step along ``-E g`` is the best that all
images can share; what is left of each one's own wish is ``g - E g``, and its size is how much a kernel that depends on
the input could gain at most, to first order, for a step of a given length. The length that counts is relative to the
kernel, as a factor in W that the BatchNorm after it takes out again has to change no score. Hence
``|W| sqrt(E |g - E g|^2)``. Over sites such gains add up, which makes the choice under a budget a knapsack
(:mod:`dysurgery.budget`).

Not its square: for steps as long as the gradient, the variance would be the gain, but plans chosen by that kept half
of the gain (``benchmarks/choose``). Nor its ratio to ``|E g|``: in a trained network that is near zero everywhere.
Nor only what the pooled input, all that an attention sees, can explain: that takes thousands of images to measure.
Called by :mod:`dysurgery.choose`.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.example import shadow, undisturbed
from dysurgery.nn import folded
from dysurgery.trace import ConvSite

Labelled = tuple[Tensor, Tensor | None]
"""Images (B, C, H, W) and their classes (B,); without classes the network's own predictions take their place."""

# A variance below this, relative to the mean square, is that of the rounding of equal gradients.
_ROUNDING = 1e-10


def by_shape(site: ConvSite) -> float:
    """Return the score of a site by its shape alone: the square root of the number of weights of a kernel.

    A larger kernel has more to gain, but less than in proportion to what it costs, so that many small layers are taken
    before a few large ones.
    """
    return math.sqrt(math.prod(site.weight_shape))


def by_gradients(model: nn.Module, sites: Iterable[ConvSite], batches: Iterable[Labelled]) -> dict[str, float]:
    """Return path -> score of each site: ``|W|`` times the standard deviation over images of the gradient of W.

    The loss is the cross-entropy with the image's class or, without, with the class that the network predicts: how it
    would have to change to be surer of what it thinks. BatchNorm keeps its statistics (eval mode). Where a layer is
    called several times for an image, each call counts. A site that no gradient reaches has the score 0.

    Args:
        model: a classifier; a shadow of it is run, on its device and in its type.
        sites: modules of it.
        batches: normalised images with their classes, see :data:`Labelled`. The sums are over single images, so that
            how they are batched matters by rounding only.

    Raises:
        UsageError: for fewer than two images, or a class that the network does not know.
        DysurgeryError: if it returns no logits (B, classes), or a gradient is not finite.
    """
    sites = tuple(sites)
    copied = shadow(model)
    like = next(copied.parameters(), torch.empty(0))
    wanted = {site.path: folded(copied.get_submodule(site.module or "")) for site in sites}
    sums = {path: _Sums(layer) for path, layer in wanted.items()}
    count = 0
    with undisturbed(copied), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        for images, classes in batches:
            with _noted(copied, sites) as calls:
                # All that follows then has a gradient, also in a network whose parameters are frozen.
                logits = copied(images.to(like.device, like.dtype, copy=True).requires_grad_())
            loss = F.cross_entropy(logits, _targets(model, logits, images, classes), reduction="sum")
            grads = torch.autograd.grad(loss, [call.edge for call in calls], allow_unused=True)
            for call, grad in zip(calls, grads, strict=True):
                if grad is not None:
                    sums[call.path].add(call.args, call.kwargs, grad)
            count += len(images)
    if count < 2:
        raise UsageError(f"how gradients vary over images takes at least two of them, got {count}")
    return {path: found.score(path, count) for path, found in sums.items()}


@dataclass(frozen=True)
class _Called:
    """One call of a site: its arguments, and where its output stands in the graph of gradients."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    edge: GradientEdge


@contextmanager
def _noted(model: nn.Module, sites: Iterable[ConvSite]) -> Iterator[list[_Called]]:
    """Collect the calls of the sites in the block."""
    calls: list[_Called] = []

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        # The edge, as the tensor itself may be changed in place by the activation that follows.
        calls.append(_Called(path, args, kwargs, get_gradient_edge(output)))

    with ExitStack() as hooks:
        for site in sites:
            module = model.get_submodule(site.module or "")
            hooks.callback(module.register_forward_hook(partial(note, site.path), with_kwargs=True).remove)
        yield calls


def _targets(model: nn.Module, logits: Any, images: Tensor, classes: Tensor | None) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DysurgeryError(
            f"{type(model).__name__} is no classifier: expected logits (B, classes), got {found}; without data sites "
            "are scored by their shape"
        )
    if classes is None:
        return logits.detach().argmax(dim=1)
    if len(classes) != len(images):
        raise UsageError(f"{len(images)} images cannot have {len(classes)} classes")
    if not 0 <= int(classes.min()) <= int(classes.max()) < logits.shape[1]:
        raise UsageError(
            f"the data has the class {int(classes.max())}, and {type(model).__name__} knows the {logits.shape[1]} "
            f"classes from 0 to {logits.shape[1] - 1}: leave the labels aside (labels=False, --no-labels)"
        )
    return classes.to(logits.device)


class _Sums:
    """The sums of ``g`` and ``|g|^2`` over images for one layer, each gradient computed on its own.

    Image by image: a batch of gradients would take the batch's size times the memory of the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.weight: Tensor = layer.get_parameter("weight").detach()
        self.total = torch.zeros(self.weight.shape, dtype=torch.float64, device=_place(self.weight))
        self.squares, self.rows = 0.0, 0

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], grad: Tensor) -> None:
        """Add one call of the layer, whose output has the gradient ``grad``."""
        given = dict(kwargs)
        inputs = (args[0] if args else given.pop("input")).detach()
        if inputs.dim() < max(self.weight.dim(), 2):  # one image without its axis
            inputs, grad = inputs.unsqueeze(0), grad.unsqueeze(0)
        weight = self.weight.clone().requires_grad_()
        for x, g in zip(torch.split(inputs, 1), torch.split(grad, 1), strict=True):
            output = torch.func.functional_call(self.layer, {"weight": weight}, (x, *args[1:]), given)
            (found,) = torch.autograd.grad(output, weight, g)
            found = found.to(self.total.device, torch.float64)
            self.total += found
            self.squares += float(found.square().sum())
            self.rows += 1

    def score(self, path: str, images: int) -> float:
        """Return |W| times the standard deviation of the gradient, for each image times its calls."""
        if self.rows < 2:
            return 0.0
        variance = (self.squares - float(self.total.square().sum()) / self.rows) / (self.rows - 1)
        if variance <= _ROUNDING * self.squares / self.rows:
            return 0.0
        found = variance * float(self.weight.double().square().sum())
        if not math.isfinite(found):
            raise DysurgeryError(f"the gradient at {path} is not finite: check the images and the weights")
        return math.sqrt(found) * self.rows / images


def _place(weight: Tensor) -> torch.device:
    """Return where sums in float64 can be kept: Apple's GPU has none."""
    return torch.device("cpu") if weight.device.type == "mps" else weight.device
