"""One watched run of a model: which convolutions are called, in which order and shapes, and who reads their weights.

Called by :mod:`dysurgery.trace` with a copy of the model. The run finds every convolution that runs, also where no
graph can be drawn.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dysurgery.example import Example, run
from dysurgery.nn import DynamicLayer

FUNCTIONAL = frozenset(
    getattr(F, name)
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
)


@dataclass(frozen=True)
class Call:
    """The shapes of one call, batch included."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Arguments:
    """How a module was first called: the structure of its arguments, with tensors that have no storage."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device

    @classmethod
    def outline(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Arguments":
        """Return the outline of one call."""
        device = next((t.device for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
        outline = (args, kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), outline)
        return cls(args, kwargs, device or torch.device("cpu"))

    def zeros(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments of these shapes, filled with zeros."""
        outline = (self.args, self.kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: torch.zeros_like(t, device=self.device), outline)
        return args, kwargs


@dataclass
class Record:
    """What the watched run saw; modules by their identity.

    Attributes:
        calls: the calls of each site, in the order in which the sites first ran.
        read_elsewhere: sites whose weight or bias was read outside their own call.
        arguments: path of each module that holds a site -> how it was called.
        functional_calls: number of functional convolutions outside every site.
        output: what the model returned.
    """

    calls: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))
    read_elsewhere: set[int] = field(default_factory=set)
    arguments: dict[str, Arguments] = field(default_factory=dict)
    functional_calls: int = 0
    output: Any = None
    depth: int = 0


def is_site(module: nn.Module, linear: bool) -> bool:
    """Whether ``module`` is a convolution of any kind, a dynamic layer, or (if ``linear``) a Linear."""
    return isinstance(module, _ConvNd | DynamicLayer) or (linear and isinstance(module, nn.Linear))


def has_site(module: nn.Module, linear: bool) -> bool:
    """Whether ``module`` is or holds a site."""
    return any(is_site(inner, linear) for inner in module.modules())


def watch(copied: nn.Module, example: Example, linear: bool) -> Record:
    """Run ``copied`` once with every site watched; its classes and hooks are put back after it.

    Raises:
        DysurgeryError: if the model does not run on the example.
    """
    record = Record()
    watched: list[tuple[nn.Module, type[nn.Module]]] = []
    handles = []
    for path, module in copied.named_modules():
        if is_site(module, linear):
            watched.append((module, type(module)))
            module.__class__ = _watching(type(module), record)
        elif has_site(module, linear):
            hook = _remember_arguments(record.arguments, path)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with _CountFunctional(record):
            record.output = run(copied, example)
    finally:
        for module, cls in watched:
            module.__class__ = cls
        for handle in handles:
            handle.remove()
    return record


def _watching(cls: type[nn.Module], record: Record) -> type[nn.Module]:
    """Return a subclass that records each call, and each reading of its weight or bias outside its own forward."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        record.depth += 1
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            record.depth -= 1

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = cls.__call__(self, *args, **kwargs)
        tensor = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(tensor, Tensor) and isinstance(output, Tensor):
            record.calls[id(self)].append(Call(tuple(tensor.shape), tuple(output.shape)))
        return output

    def getattribute(self: nn.Module, name: str) -> Any:
        if name in ("weight", "bias") and record.depth == 0:
            record.read_elsewhere.add(id(self))
        return cls.__getattr__(self, name)

    return type(cls.__name__, (cls,), {"__call__": call, "forward": forward, "__getattr__": getattribute})


def _remember_arguments(arguments: dict[str, Arguments], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path not in arguments:
            arguments[path] = Arguments.outline(args, kwargs)

    return hook


class _CountFunctional(TorchFunctionMode):
    """Counts the functional convolutions that are called outside every watched module."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FUNCTIONAL and self.record.depth == 0:
            self.record.functional_calls += 1
        return func(*args, **(kwargs or {}))
