"""The dynamic layers of a network one by one: what each is called with, and the step that is measured.

For :mod:`dysurgery.bench`, which shows what each layer costs, and :mod:`dysurgery.autotune`, which finds its fastest
way.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dysurgery.example import tensors
from dysurgery.nn import DynamicLayer, duplicate
from dysurgery.verify import channels_last

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Call:
    """What a layer was called with, without keeping it.

    Attributes:
        shape: of the input.
        layout: a name in :data:`LAYOUTS`.
        dtype: of the input.
        device: of the input.
        needs_grad: whether a gradient with respect to it is wanted.
    """

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool

    def inputs(self) -> Tensor:
        """Return a random input like it."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape, generator=generator).to(self.device, self.dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=LAYOUTS[self.layout])
        return x.requires_grad_(self.needs_grad)


def layer_calls(network: nn.Module, step: Callable[[], object]) -> dict[str, list[Call]]:
    """Return path of each dynamic layer of ``network`` that ``step`` calls -> what with."""
    seen: dict[str, list[Call]] = {}
    hooks = []
    for path, module in network.named_modules():
        if isinstance(module, DynamicLayer):

            def note(module: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
                x = args[0]
                call = Call(tuple(x.shape), "nhwc" if channels_last(x) else "nchw", x.dtype, x.device, x.requires_grad)
                seen.setdefault(path, []).append(call)

            hooks.append(module.register_forward_pre_hook(note))
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def measured_step(
    mode: str, network: nn.Module, run: Callable[[Tensor], Any], inputs: Sequence[Tensor]
) -> Callable[[], None]:
    """Return what is measured: ``run``, which may be ``network`` compiled, on each input, and backward in training."""

    def infer() -> None:
        with torch.inference_mode():
            for x in inputs:
                run(x)

    def train() -> None:
        with torch.enable_grad():
            for x in inputs:
                found = [y for y in tensors(run(x)) if y.requires_grad]
                # As the gradient of the sum of the outputs, but whole tensors, as layers get them in a network.
                torch.autograd.backward(found, [torch.ones_like(y) for y in found])
                x.grad = None
        network.zero_grad(set_to_none=True)

    return infer if mode == "infer" else train


def twin_of(network: nn.Module, shares: Callable[[Tensor], bool] = lambda tensor: True) -> nn.Module:
    """Return a copy that shares the parameters and buffers which ``shares`` says."""
    held = itertools.chain(network.parameters(), network.buffers())
    return duplicate(network, {id(tensor): tensor for tensor in held if shares(tensor)})
