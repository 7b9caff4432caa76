"""Parameter groups: the mixed kernel is to move as fast as the static one did.

Under SGD kernel k gets ``pi_k * g`` of the mixed kernel's gradient g, so that a step at rate r moves the mix by
``sum_k pi_k^2 * r * g``: K times slower than the static kernel where pi = 1/K, as fast where one kernel takes all.
Banks therefore get ``1 / sum_k E[pi_k]^2`` times the rate, E being the mean over the images of the step, and their
weight decay divided by as much, so that it acts as before. That is K times after conversion. Were it K for ever, an
attention that sharpens would speed its kernels up, which shifts the features that it sees, which sharpens it further,
to the network's collapse (``benchmarks/finetune``). Adam and its like divide the size of the gradient out, and need no
scaling.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dysurgery.errors import UsageError
from dysurgery.nn import DynamicLayer

# Optimizers of timm whose step is proportional to the gradient.
_PROPORTIONAL = {"sgd", "momentum", "nesterov", "nesterovw", "sgdw", "sgdp"}


def parameter_groups(
    model: nn.Module,
    opt: str,
    lr: float,
    weight_decay: float,
    *,
    bank_lr: float | None = None,
    attention_lr: float = 1.0,
    attention_weight_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return the parameter groups of ``model`` for an optimizer called ``opt``, those that require a gradient.

    Vectors and scalars (biases, BatchNorm) get no weight decay, as in timm.

    Args:
        model: static or dynamic.
        opt: a name of timm's.
        lr: of everything that has no factor.
        weight_decay: of everything that has no factor.
        bank_lr: factor on the rate and divisor of the weight decay of the banks; None is the layer's K under SGD and
            its like, right for pi = 1/K and kept right by :class:`BankRates`, else 1. 0 freezes them.
        attention_lr: factor on the rate of the attention.
        attention_weight_decay: factor on its weight decay.

    Returns:
        The groups; one that :class:`BankRates` is to follow has its layer's path under ``layer``, the others None.
    """
    proportional = opt.lower() in _PROPORTIONAL
    factors: dict[int, tuple[float, float, str | None]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, DynamicLayer):
            scale = bank_lr if bank_lr is not None else float(layer.k) if proportional else 1.0
            for bank in (layer.bank, layer.bias_bank):
                if bank is not None:
                    followed = path if bank_lr is None and proportional else None
                    factors[id(bank)] = (scale, 1.0 / scale if scale else 0.0, followed)
            for parameter in layer.gate.parameters():
                factors[id(parameter)] = (attention_lr, attention_weight_decay, None)
    groups: dict[tuple[float, float, str | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate, decay, layer = factors.get(id(parameter), (1.0, 1.0, None))
            decays = parameter.ndim > 1 and not name.endswith("bias_bank")
            groups.setdefault((rate, decay if decays else 0.0, layer), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * rate, "weight_decay": weight_decay * decay, "layer": layer}
        for (rate, decay, layer), parameters in groups.items()
    ]


class BankRates:
    """Follows how the attention is used, and keeps the banks' rates right for it.

    Args:
        model: what is trained; its gates are watched in training mode.
        optimizer: its groups are those of :func:`parameter_groups`; loading a state gives it others.
        total: sums each value over all processes, so that all take the same step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total: Callable[..., list[float]] = lambda *values: [*values],
    ) -> None:
        self.optimizer, self.total = optimizer, total
        followed = {group["layer"] for group in optimizer.param_groups} - {None}
        self.layers = {p: m for p, m in model.named_modules() if p in followed and isinstance(m, DynamicLayer)}
        self.seen: dict[str, list[Tensor]] = defaultdict(list)
        self.hooks = [layer.gate.register_forward_hook(self._watch(path)) for path, layer in self.layers.items()]

    def close(self) -> None:
        """Stop watching."""
        for hook in self.hooks:
            hook.remove()

    def _watch(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(gate: nn.Module, args: Any, pi: Tensor) -> None:
            if gate.training:
                flat = pi.detach().reshape(-1, pi.shape[-1])
                self.seen[path].append(torch.cat([flat.sum(dim=0), flat.new_full((1,), len(flat))]))

        return add

    def factors(self) -> dict[str, float]:
        """Return ``1 / (K * sum_k E[pi_k]^2)`` of each layer over the images since the last call, and forget them."""
        sums = [
            torch.stack(self.seen[path]).sum(dim=0).double() if self.seen[path] else torch.zeros(layer.k + 1).double()
            for path, layer in self.layers.items()
        ]
        self.seen.clear()
        if not sums:
            return {}
        here = torch.cat([each.to(sums[-1].device) for each in sums])
        everywhere = iter(self.total(*here.tolist()))
        found = {}
        for path, layer in self.layers.items():
            *used, count = [next(everywhere) for _ in range(layer.k + 1)]
            found[path] = count**2 / (layer.k * sum(each**2 for each in used)) if count else 1.0
        return found

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Take the optimizer's step in here."""
        factors, groups = self.factors(), self.optimizer.param_groups
        kept = [(group["lr"], group["weight_decay"]) for group in groups]
        for group in groups:
            factor = factors.get(group["layer"], 1.0)
            group["lr"], group["weight_decay"] = group["lr"] * factor, group["weight_decay"] / factor
        yield
        for group, (lr, weight_decay) in zip(groups, kept, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay


def freeze(model: nn.Module, train: str) -> None:
    """Let only the parameters train that ``train`` names: ``all``, ``dynamic`` (banks and attention), ``attention``.

    Those that were frozen stay frozen.

    Raises:
        UsageError: if nothing is left to train.
    """
    if train != "all":
        layers = [layer for layer in model.modules() if isinstance(layer, DynamicLayer)]
        parts = layers if train == "dynamic" else [layer.gate for layer in layers]
        freeze_all_but(model, (parameter for part in parts for parameter in part.parameters()))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"nothing to train: the model has no parameter that train = {train!r} names and is not frozen")


def freeze_all_but(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Freeze what is not among ``parameters``; those that were frozen stay frozen."""
    kept = {id(parameter) for parameter in parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
