"""Is the converted model the original? Both run on a random batch, and every output tensor is compared.

Called by :mod:`dysurgery.rewrite` at every conversion.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dysurgery.errors import DysurgeryError
from dysurgery.example import Example, batch_size, called, numbers, run, shadow, tensors
from dysurgery.nn import DynamicLayer, duplicate

# Largest difference that rounding explains, relative to the largest output.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def random_batch(model: nn.Module, example: Example, seed: int) -> Example:
    """Return an example of the same form with random floats and, where the model accepts them, two images.

    With two images every sample has kernels of its own, which is another way to run than for one.
    """
    batch = batch_size(model, example)
    generator = torch.Generator().manual_seed(seed)

    def fresh(tensor: Tensor, count: int) -> Tensor:
        shape = (count, *tensor.shape[1:]) if tensor.dim() and tensor.shape[0] == batch else tuple(tensor.shape)
        if not tensor.is_floating_point():
            return tensor.expand(shape) if tensor.dim() and tensor.shape[0] == 1 else tensor
        noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(tensor.device, tensor.dtype)
        return noise.contiguous(memory_format=torch.channels_last) if channels_last(tensor) else noise

    def batch_of(count: int) -> Example:
        mapped: Example = pytree.tree_map_only(Tensor, lambda tensor: fresh(tensor, count), example)
        return mapped

    if batch == 1:
        try:
            inputs = batch_of(2)
            run(shadow(model), inputs)
        except DysurgeryError:
            return batch_of(1)
        return inputs
    return batch_of(batch)


def channels_last(tensor: Tensor) -> bool:
    """Whether an image tensor is laid out in channels_last, and in no other way as well."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def outputs(model: nn.Module, inputs: Example, modes: Sequence[bool] = (False,)) -> list[Any]:
    """Run a copy of ``model`` in each mode (True is train), and return what it gives."""
    return [run(shadow(model).train(mode), inputs) for mode in modes]


def largest_difference(expected: Sequence[Any], found: Sequence[Any]) -> tuple[float, float]:
    """Return the largest :func:`difference` of several runs."""
    each = [difference(a, b) for a, b in zip(expected, found, strict=True)]
    return max(absolute for absolute, _ in each), max(relative for _, relative in each)


def rounded(model: nn.Module, paths: Iterable[str], inputs: Example) -> Any:
    """Return the outputs of ``model`` in eval mode if the layers at ``paths`` rounded otherwise."""
    copied = shadow(model)

    def round_otherwise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        size = output.square().mean().sqrt()  # sums round by the size of their terms, not of their result
        return output + 2 * torch.finfo(output.dtype).eps * size * torch.randn_like(output)

    for path in paths:
        copied.get_submodule(path).register_forward_hook(round_otherwise)
    return run(copied, inputs)


def in_float64(model: nn.Module, inputs: Example) -> list[Any] | None:
    """Return what a copy of ``model`` gives in float64 and eval mode, or None if it does not run in that type."""
    exact: Example = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    try:
        return [run(duplicate(model).double().eval(), exact)]
    except DysurgeryError:  # a type may be written into its code
        return None


def layers_differ(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Example, then: Mapping[str, nn.Module] | None = None
) -> float:
    """Return by how much ``layers`` differ from the modules at their paths, on what those see in ``model``.

    Args:
        model: the original.
        layers: path -> what is compared with the module there.
        inputs: of the model.
        then: path -> a module through which the output of the original goes before it is compared.
    """
    copied, worst = shadow(model), [0.0]
    for path, layer in layers.items():
        layer, after = shadow(layer), shadow(then[path]) if then else nn.Identity()

        def compare(
            module: nn.Module, args: Any, output: Any, layer: nn.Module = layer, after: nn.Module = after
        ) -> None:
            worst.append(difference(after(output), layer(*args))[1])

        copied.get_submodule(path).register_forward_hook(compare)
    run(copied, inputs)
    return max(worst)


def difference(expected: Any, found: Any) -> tuple[float, float]:
    """Return the largest absolute difference over all floating-point outputs, and relative to the largest output."""
    left, right = tensors(expected), tensors(found)
    if not left:
        raise DysurgeryError(f"the model returns no tensor that could be compared ({type(expected).__name__})")
    if any(tensor.is_meta for tensor in left):
        raise DysurgeryError("the model is on the meta device, where nothing can be compared: give it weights first")
    if [t.shape for t in left] != [t.shape for t in right]:
        return math.inf, math.inf
    absolute = scale = 0.0
    for a, b in zip(left, right, strict=True):
        if a.numel() == 0:
            continue
        a, b = numbers(a), numbers(b)
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        worst = apart.max().item()
        absolute = max(absolute, math.inf if math.isnan(worst) else worst)
        finite = a[a.isfinite()].abs()
        scale = max(scale, finite.max().item() if finite.numel() else 0.0)
    return absolute, absolute / scale if scale else absolute


def tolerance(model: nn.Module) -> tuple[torch.dtype, float]:
    """Return the model's floating-point type, and the relative difference that rounding explains in it."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return dtype, TOLERANCES.get(dtype, TOLERANCES[torch.float32])


def layers_that_run(model: nn.Module, example: Example) -> set[str]:
    """Return every path of the dynamic layers that are called on ``example``."""
    copied = shadow(model)
    with called() as ran:
        run(copied, example)
    modules = copied.named_modules(remove_duplicate=False)
    return {path for path, module in modules if isinstance(module, DynamicLayer) and id(module) in ran}
