"""What a model is called with, and how to run it without leaving a trace.

Everything that runs the caller's model runs a :func:`shadow` of it, :func:`undisturbed`: its mode, its parameters (some
models write theirs in forward), its buffers and the random state stay as they were.
"""

import dataclasses
import itertools
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from dysurgery.errors import DysurgeryError, UsageError, sentence
from dysurgery.nn import DynamicLayer, duplicate
from dysurgery.nn.conv import DynamicConvNd

Example = Tensor | tuple[Any, ...] | dict[str, Any]
"""One tensor, a tuple of positional arguments, or a dict of keyword arguments."""


def call_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that ``example`` stands for.

    Raises:
        UsageError: if it is neither a tensor, a tuple nor a dict.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, dict):
        return (), example
    raise UsageError(
        f"an example is a tensor, a tuple of arguments or a dict of keyword arguments, got {type(example).__name__}; "
        "for a model that takes a list, wrap it in a tuple: ([image, image],)"
    )


def batch_size(model: nn.Module, example: Example) -> int:
    """Return the number of images (clips, recordings) in the example: the length of its first batch, else 1."""
    batch = first_batch(model, example)
    return 1 if batch is None else max(batch.shape[0], 1)


def first_batch(model: nn.Module, example: Example) -> Tensor | None:
    """Return the first tensor of the example that is a batch, if there is one.

    A batch has at least two axes more than the model's first convolution; one of recordings may lack the channel.
    """
    axes = spatial_axes(model)
    for leaf in pytree.tree_leaves(call_arguments(example)):
        if isinstance(leaf, Tensor) and leaf.dim() >= (axes + 2 if axes > 1 else 2):
            return leaf
    return None


def spatial_axes(model: nn.Module) -> int:
    """Return the number of axes that the model's first convolution goes over; 2 if it has none."""
    return next((len(m.stride) for m in model.modules() if isinstance(m, _ConvNd | DynamicConvNd)), 2)


def shadow(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in eval mode, to run and to trace.

    It shares the parameters of dynamic layers, the bulk of a converted model, and nothing else: no code but that of
    those layers knows them, while some models write their own parameters in forward.

    Raises:
        UsageError: if it has lazy layers that have no weights yet.
        DysurgeryError: if the model cannot be copied.
    """
    tensors_of = itertools.chain(model.named_parameters(), model.named_buffers())
    if lazy := [name for name, tensor in tensors_of if is_lazy(tensor)]:
        raise UsageError(
            f"{type(model).__name__} has lazy layers without weights ({', '.join(lazy[:3])}): run it once on an input, "
            "and remove those that it never calls"
        )
    dynamic = [module for module in model.modules() if isinstance(module, DynamicLayer)]
    try:
        copied = duplicate(model, {id(p): p for layer in dynamic for p in layer.parameters()})
    except Exception as error:
        raise DysurgeryError(f"{type(model).__name__} cannot be copied (copy.deepcopy: {sentence(error)})") from error
    shared = {id(module) for module in model.modules()}
    if own := [type(module).__name__ for module in copied.modules() if id(module) in shared]:
        raise DysurgeryError(
            f"{type(model).__name__} cannot be copied: the __deepcopy__ of {own[0]} returns the original"
        )
    return copied.eval()


@contextmanager
def undisturbed(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Seed the generators of torch, Python and numpy for the block, without gradients; put them back after it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = {p.device for p in itertools.chain(model.parameters(), model.buffers()) if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def run(model: nn.Module, example: Example) -> Any:
    """Run ``model`` on ``example`` undisturbed, and return its output.

    Raises:
        DysurgeryError: if the model raises.
    """
    args, kwargs = call_arguments(example)
    # What is compiled runs as it is written: compiled code would not see hooks that are set for one run.
    with undisturbed(model), torch.compiler.set_stance("force_eager"):
        try:
            return model(*args, **kwargs)
        except Exception as error:
            shapes = ", ".join(
                str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else repr(leaf)
                for leaf in pytree.tree_leaves((args, kwargs))
            )
            raise DysurgeryError(
                f"{type(model).__name__} does not run on an example of shape {shapes}: "
                f"{type(error).__name__}: {error}".rstrip()
            ) from error


@contextmanager
def called() -> Iterator[set[int]]:
    """Collect the identity of every module that is called in the block, of whichever model."""
    found: set[int] = set()
    handle = register_module_forward_pre_hook(lambda module, args: found.add(id(module)))
    try:
        with warnings.catch_warnings():
            # They fire twice for a compiled module, which does not matter here.
            warnings.filterwarnings("ignore", message=".*global hooks on modules")
            yield found
    finally:
        handle.remove()


def tensors(output: Any) -> list[Tensor]:
    """Return every tensor in an output, opening containers, dataclasses and plain objects."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list | tuple | set | frozenset):
            for inner in value:
                collect(inner)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):  # with __slots__ it has no __dict__
            for field in dataclasses.fields(value):
                collect(getattr(value, field.name, None))
        elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and not callable(value):
            collect(vars(value))

    collect(output)
    return found


def numbers(tensor: Tensor) -> Tensor:
    """Return the values of a tensor of any layout and type as dense real float64, to compare them."""
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return (torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense).double()
