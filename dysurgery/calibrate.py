"""A varied attention to start from, measured on images; the function stays what it was.

While the K kernels of a layer are equal, any weights pi that sum to one give the same mixed kernel. The attention may
therefore start as varied as the data allow. A fresh one hardly varies: all kernels then get the same gradient, and
they stay equal for long.

Scaling up the last layer alone makes the logits vary, but by small differences between large pooled features, so that
the first steps of training move every logit far off and one kernel takes all (``benchmarks/finetune``). Both layers are
therefore set: the first sees standardised channels and has pre-activations of mean 0 and variance 1, the second
logits of mean 0 and the chosen standard deviation.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dysurgery.errors import DysurgeryError, UsageError, did_you_mean
from dysurgery.example import undisturbed
from dysurgery.nn import DynamicLayer, Gate

DEFAULT_STD = 0.1
DEFAULT_BY = "random"

# A feature that varies less than this over images, relative to the others or to its own size, is as good as constant.
_QUIET, _CONSTANT = 0.1, 1e-5


@dataclass(frozen=True)
class Calibrated:
    """What happened to one gate.

    Attributes:
        path: of its layer.
        before: (K,) standard deviation of the logits over images as they were.
        after: (K,) as it is now; 0 where the pooled features do not vary over the images.
    """

    path: str
    before: tuple[float, ...]
    after: tuple[float, ...]


def calibrate(
    model: nn.Module, images: Tensor | Iterable[Tensor], *, std: float = DEFAULT_STD, by: str = DEFAULT_BY
) -> tuple[Calibrated, ...]:
    """Give every attention logit mean 0 and standard deviation ``std`` over ``images``, in place.

    The output of the model does not change, which is why the kernels of every layer must still be equal (the start
    ``copies``, before training). Layers that the images do not reach are left alone.

    Args:
        model: a freshly converted network; its mode, buffers and the random state stay as they are.
        images: (B, C, H, W) as the model takes them, or batches of them; a few hundred images are enough.
        std: of the logits at tau = 1, in 0..100; 0 makes the attention uniform.
        by: what tells images apart: ``random`` directions, the fresh layer's own; the same ones ``decorrelated`` over
            images; or ``clusters`` of the pooled features, one for each kernel.

    Returns:
        One entry for each gate that was reached, in the order of the model.

    Raises:
        UsageError: for a model without dynamic layers, kernels that differ, a gate whose weights do not sum to one,
            or no images.
        DysurgeryError: if the logits are not finite.
    """
    if not 0 <= std <= 100:
        raise UsageError(f"the standard deviation of the logits is in 0..100, got {std}")
    if by not in WAYS:
        raise UsageError(f"the logits are set by {' or '.join(WAYS)}, got {by!r}{did_you_mean(by, list(WAYS))}")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, DynamicLayer)}
    if not layers:
        raise UsageError("the model has no dynamic layer: convert it first (dysurgery.convert)")
    for path, layer in layers.items():
        _check_free(path, layer)
    pooled = _pooled(model, layers, [images] if isinstance(images, Tensor) else images)
    done = []
    for path, layer in layers.items():
        if path in pooled:
            done.append(_set(path, layer.gate, pooled[path], std, WAYS[by]))
    return tuple(done)


def can_calibrate(model: nn.Module) -> bool:
    """Whether every attention of ``model`` may be chosen freely without changing its function."""
    layers = [layer for layer in model.modules() if isinstance(layer, DynamicLayer)]
    return bool(layers) and all(layer.gate.sums_to_one and _equal_kernels(layer) for layer in layers)


def _equal_kernels(layer: DynamicLayer) -> bool:
    banks = [bank for bank in (layer.bank, layer.bias_bank) if bank is not None]
    return all(torch.equal(bank, bank[:1].expand_as(bank)) for bank in banks)


def _check_free(path: str, layer: DynamicLayer) -> None:
    if not layer.gate.sums_to_one:
        raise UsageError(
            f"the {layer.gate.name} gate of {path} cannot be calibrated: its weights do not sum to 1, so that the "
            "output would change; convert with gate='softmax'"
        )
    if not _equal_kernels(layer):
        raise UsageError(
            f"the kernels of {path} differ, so that calibrating would change the output: calibrate right after "
            "converting with start='copies'"
        )


# Given the last layer's weight (K, H), its inputs (N, H) and the standardised pooled features (N, C), another weight.
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def _random(weight: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
    return weight


def _decorrelated(weight: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
    """Let every two of the K logits correlate by -1/(K - 1), the least that all of them can have at once."""
    centred = hidden - hidden.mean(dim=0)
    values, axes = torch.linalg.eigh(centred.T @ centred / len(hidden))
    alive = values > _CONSTANT * values.amax()
    whiten = axes[:, alive] / values[alive].sqrt()
    turned = weight @ axes[:, alive]
    left, _, right = torch.linalg.svd(turned - turned.mean(dim=0), full_matrices=False)
    rank = min(len(weight) - 1, right.shape[0])
    found: Tensor = left[:, :rank] @ right[:rank] @ whiten.T
    return found


def _clusters(weight: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
    """Fit the logits to which of K clusters an image belongs to, by least squares."""
    from sklearn.cluster import KMeans  # takes a second to import

    found = KMeans(len(weight), n_init=4, random_state=0).fit_predict(pooled.numpy())
    member = F.one_hot(torch.from_numpy(found).long(), len(weight)).double()
    solution: Tensor = torch.linalg.lstsq(
        hidden - hidden.mean(dim=0), member - member.mean(dim=0), driver="gelsd"
    ).solution
    return solution.T


WAYS: dict[str, Way] = {"random": _random, "decorrelated": _decorrelated, "clusters": _clusters}


def _pooled(model: nn.Module, layers: dict[str, DynamicLayer], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Run the images through the model in eval mode; return the input (N, C) of each gate that they reached."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for path, layer in layers.items():

        def collect(gate: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            seen.setdefault(path, []).append(args[0].reshape(-1, args[0].shape[-1]).double().cpu())

        hooks.append(layer.gate.register_forward_pre_hook(collect))
    modes = {module: module.training for module in model.modules()}
    like = next(itertools.chain(model.parameters(), model.buffers()))
    count = 0
    try:
        model.eval()
        with undisturbed(model):
            for batch in batches:
                if len(batch):
                    model(batch.to(like.device))
                    count += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise UsageError("no images to calibrate on")
    return {path: torch.cat(parts) for path, parts in seen.items()}


def _set(path: str, gate: Gate, pooled: Tensor, std: float, way: Way) -> Calibrated:
    """Set both layers of one gate for its inputs ``pooled`` (N, C)."""
    if not torch.isfinite(pooled).all():
        raise DysurgeryError(f"the input of the attention of {path} is not finite: check the images and the weights")
    w1, b1, w2, b2 = (p.detach().double().cpu() for p in (*gate.fc1.parameters(), *gate.fc2.parameters()))
    before = F.linear(F.relu(F.linear(pooled, w1, b1)), w2, b2).std(dim=0, correction=0)

    mean, spread = pooled.mean(dim=0), pooled.std(dim=0, correction=0)
    typical = spread.square().mean().sqrt()
    if typical <= _CONSTANT * pooled.abs().max():
        return Calibrated(path, tuple(before.tolist()), tuple(before.tolist()))
    w1 = w1 / spread.clamp_min(_QUIET * typical)
    w1, b1 = _standardised(w1, -w1 @ mean, pooled, 1.0)
    hidden = F.relu(F.linear(pooled, w1, b1))
    w2 = way(w2, hidden, (pooled - mean) / spread.clamp_min(_QUIET * typical))
    # What all K logits have in common changes no softmax.
    w2, b2 = _standardised(w2 - w2.mean(dim=0), b2, hidden, std)
    with torch.no_grad():
        for parameter, value in zip((*gate.fc1.parameters(), *gate.fc2.parameters()), (w1, b1, w2, b2), strict=True):
            parameter.copy_(value)
    return Calibrated(path, tuple(before.tolist()), tuple(F.linear(hidden, w2, b2).std(dim=0, correction=0).tolist()))


def _standardised(weight: Tensor, bias: Tensor, inputs: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """Scale and shift a linear layer so that each output has mean 0 and deviation ``std``, if it varies at all."""
    outputs = F.linear(inputs, weight, bias)
    mean, spread = outputs.mean(dim=0), outputs.std(dim=0, correction=0)
    scale = torch.where(spread > _CONSTANT * outputs.abs().amax(dim=0), std / spread, torch.zeros_like(spread))
    return weight * scale[:, None], (bias - mean) * scale
