"""A model becomes one file for deployment, ONNX or torch.export's ``.pt2``, and is checked where it will run.

In comes any network, dynamic or static; out goes a file that takes any number of images. It is written beside its
place, run in onnxruntime or in a fresh process, compared with the model, and only then put there. How each kind of
file is written and run is the business of :mod:`dysurgery.formats`; how fast they are, that of
:mod:`dysurgery.deployed`.
"""

import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from dysurgery.errors import DysurgeryError, UsageError, did_you_mean
from dysurgery.example import (
    Example,
    batch_size,
    call_arguments,
    first_batch,
    run,
    shadow,
    spatial_axes,
    tensors,
    undisturbed,
)
from dysurgery.files import write_atomically
from dysurgery.formats import FORMATS, Traced, failing, leaves
from dysurgery.models import is_configured, preprocessing_of
from dysurgery.nn import duplicate
from dysurgery.nn.conv import DynamicConvNd
from dysurgery.nn.execution import Chooser
from dysurgery.verify import difference, tolerance

BATCHES = (1, 2, 5)

# By how much the axes of an image grow for the checks at other sizes: by multiples of what networks halve them by, and
# to something odd, which not every network takes.
GROWTHS = ((32, 64, 32), (7, 19, 1))

_AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@dataclass(frozen=True)
class Check:
    """One run of the file.

    Attributes:
        shapes: of the tensors that went in.
        max_abs_diff: largest absolute difference from the model over all outputs.
        relative_diff: the same relative to the largest output.
    """

    shapes: tuple[tuple[int, ...], ...]
    max_abs_diff: float
    relative_diff: float


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the model.

    Attributes:
        path: the file.
        format: a name in :data:`FORMATS`.
        size: of the file, in bytes.
        opset: of ONNX; None for another format.
        inputs: names of the tensors that go in, in order.
        outputs: names of those that come out.
        checks: one for each batch and image size.
    """

    path: Path
    format: str
    size: int
    opset: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def relative_diff(self) -> float:
        """The largest of all checks."""
        return max(check.relative_diff for check in self.checks)


def export(
    model: nn.Module,
    example: Example | tuple[int, ...],
    path: str | os.PathLike[str],
    format: str = "onnx",
    *,
    dynamic_size: bool = False,
    batches: Sequence[int] = BATCHES,
    opset: int | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    force: bool = False,
) -> Exported:
    """Write what ``model`` computes in eval mode to one file, for the CPU, and check that the file computes the same.

    The model is left alone. Preprocessing and classes go along, each value as JSON: in ONNX's ``metadata_props``, or as
    the extra file ``metadata.json`` of a ``.pt2``.

    Args:
        model: any network, converted or not.
        example: what it is called with (a tensor, a tuple of arguments, a dict of keyword arguments), or the size
            (C, H, W) of one image. Tensors whose first axis is the batch may have any number of rows in the file;
            what is no tensor becomes a constant.
        path: of the file, which ends in ``.onnx`` or ``.pt2``.
        format: ``onnx`` (needs the packages onnx, onnxscript and onnxruntime) or ``pt2``.
        dynamic_size: leave open the axes after the channels, too: height and width.
        batches: numbers of images to check the file with.
        opset: of ONNX; by default the one that torch recommends.
        preprocessing: what images go through, as ``config.json`` of a saved folder has it. None takes what the model
            says of itself (``pretrained_cfg``), if anything.
        classes: names of the outputs.
        force: replace an existing file.

    Raises:
        UsageError: for an unknown format, a file name that does not fit it, or a value out of range.
        DysurgeryError: if a package is missing, the file exists or cannot be written, the model cannot be exported, or
            the file would compute something else; what was at ``path`` is still there.
    """
    target = check_target(path, format, force=force)
    where = FORMATS[format]
    if opset is not None and format != "onnx":
        raise UsageError(f"an opset belongs to ONNX: leave it out for format {format!r}")
    if not batches or min(batches) < 1:
        raise UsageError(f"batches to check are numbers from 1 on, got {', '.join(map(str, batches)) or 'none'}")
    original = on_cpu(model)
    dtype, allowed = tolerance(original)
    if dtype not in where.dtypes:
        raise DysurgeryError(
            f"onnxruntime has no convolution in {str(dtype).removeprefix('torch.')}: export model.float(), or with "
            "format 'pt2'"
        )
    example = pytree.tree_map_only(Tensor, Tensor.cpu, _example(example, dtype))
    axes = _open_axes(original, example, dynamic_size)
    checked = [_inputs(example, axes, batch) for batch in dict.fromkeys(batches)]
    expected = [tensors(run(original, inputs)) for inputs in checked]
    if dynamic_size:
        grown = _at_other_sizes(original, example, axes)
        checked += [inputs for inputs, _ in grown]
        expected += [outputs for _, outputs in grown]
    metadata = _metadata(model, example, preprocessing, classes)
    checks: list[Check] = []
    written: list[tuple[Traced, int | None]] = []

    def write(file: IO[bytes]) -> None:
        traced = _trace(original, where.chooser, _inputs(example, axes, 2), axes, metadata, opset, dynamic_size)
        with failing("written"):
            written.append((traced, where.write(traced, file)))
        file.flush()
        for inputs, left, right in zip(checked, expected, where.run(Path(file.name), traced, checked), strict=True):
            shapes = tuple(tuple(tensor.shape) for tensor in leaves(inputs))
            checks.append(Check(shapes, *difference(left, right)))
            _refuse(checks[-1], allowed, left, right)

    write_atomically(target, write)
    traced, found = written[0]
    return Exported(target, format, target.stat().st_size, found, traced.inputs, traced.outputs, tuple(checks))


def check_target(path: str | os.PathLike[str], format: str, *, force: bool) -> Path:
    """Return ``path``, made absolute, if :func:`export` may write there in this format.

    Raises:
        UsageError: for an unknown format, or a file name that does not fit it.
        DysurgeryError: if it needs a package that is missing, or the file exists and ``force`` does not allow to
            replace it.
    """
    if format not in FORMATS:
        raise UsageError(
            f"unknown format {format!r}: expected one of {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}"
        )
    target = Path(os.path.abspath(path))
    if target.suffix != f".{format}":
        raise UsageError(f"a file of format {format!r} ends in .{format}, got {path}: rename it or choose its format")
    if missing := [name for name in FORMATS[format].packages if importlib.util.find_spec(name) is None]:
        raise DysurgeryError(f"format {format!r} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if target.is_dir():
        raise DysurgeryError(f"{target} is in the way: it is a folder")
    if os.path.lexists(target) and not force:
        raise DysurgeryError(f"{target} exists already: choose another file, or replace it with --force (force=True)")
    return target


def on_cpu(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode, on the CPU."""
    copied = shadow(getattr(model, "_orig_mod", model))  # what torch.compile wraps
    devices = {tensor.device.type for tensor in (*copied.parameters(), *copied.buffers())}
    if "meta" in devices:
        raise DysurgeryError(f"{type(model).__name__} is on the meta device, where it has no weights: load some first")
    # The copy shares the parameters of dynamic layers, so that it has to be copied again before it moves.
    return copied if devices <= {"cpu"} else duplicate(copied).cpu()


def _example(example: Example | tuple[int, ...], dtype: torch.dtype) -> Example:
    """Return the example itself, or one image of the size that it is."""
    if isinstance(example, tuple) and len(example) > 1 and all(type(size) is int for size in example):
        if min(example) < 1:
            raise UsageError(f"an input size is positive numbers (C, H, W), got {example}")
        return torch.zeros(1, *example, dtype=dtype)
    call_arguments(example)
    return example


def _open_axes(model: nn.Module, example: Example, dynamic_size: bool) -> list[dict[int, str]]:
    """Return the names of the open axes of each tensor in the example; axes of the same name and length are equal."""
    batch, images, count = batch_size(model, example), first_batch(model, example), spatial_axes(model)
    lengths: dict[str, int] = {}

    def named(name: str, length: int) -> str:
        suffixed, number = name, 1
        while lengths.setdefault(suffixed, length) != length:
            number += 1
            suffixed = f"{name}_{number}"
        return suffixed

    found = []
    for tensor in leaves(example):
        axes = {}
        if tensor.dim() and tensor.shape[0] == batch:
            axes[0] = "batch"
            if dynamic_size and (tensor.dim() >= count + 2 or tensor is images):
                first = tensor.dim() - count
                axes |= {first + n: named(name, tensor.shape[first + n]) for n, name in enumerate(_AXES[count])}
        found.append(axes)
    if not any(found):
        raise UsageError("the example holds no batch: give it a tensor whose first axis is the images")
    return found


def _inputs(
    example: Example, axes: Sequence[Mapping[int, str]], batch: int, growth: tuple[int, ...] = (0, 0, 0)
) -> Example:
    """Return an example of the same form, with ``batch`` rows and grown images: random floats, else repeated."""
    generator = torch.Generator().manual_seed(batch)
    remaining = iter(axes)

    def fresh(tensor: Tensor) -> Tensor:
        names = next(remaining)
        spatial = [axis for axis in names if axis]
        shape = list(tensor.shape)
        for axis in names:
            shape[axis] = shape[axis] + growth[spatial.index(axis)] if axis else batch
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(tensor.dtype)
        for axis in names:
            tensor = tensor.index_select(axis, torch.arange(shape[axis]) % tensor.shape[axis])
        return tensor

    mapped: Example = pytree.tree_map_only(Tensor, fresh, example)
    return mapped


def _at_other_sizes(
    model: nn.Module, example: Example, axes: Sequence[Mapping[int, str]]
) -> list[tuple[Example, list[Tensor]]]:
    """Return two images of each other size that the model takes, and what it gives."""
    found, reason = [], None
    for growth in GROWTHS:
        inputs = _inputs(example, axes, 2, growth)
        try:
            found.append((inputs, tensors(run(model, inputs))))
        except DysurgeryError as error:
            reason = error
    if not found:
        raise DysurgeryError(f"{reason}: leave out --dynamic-size (dynamic_size=True)") from reason
    return found


def _trace(
    model: nn.Module,
    chooser: Chooser,
    inputs: Example,
    axes: Sequence[Mapping[int, str]],
    metadata: dict[str, str],
    opset: int | None,
    dynamic_size: bool,
) -> Traced:
    """Return the program of a copy in which every dynamic convolution goes the way of ``chooser``."""
    copied = shadow(model)
    for layer in copied.modules():
        if isinstance(layer, DynamicConvNd):
            layer.chooser = chooser
    args, kwargs = call_arguments(inputs)
    hints = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor, names in zip(leaves(inputs), axes, strict=True):
        hints[tensor] = dict.fromkeys(names, Dim.DYNAMIC)
    advice = ": leave out --dynamic-size (dynamic_size=True)" if dynamic_size else ""
    with (
        failing(f"exported ({type(model).__name__}){' at any size' if dynamic_size else ''}", advice),
        undisturbed(copied),
    ):
        shapes = hints.dynamic_shapes(copied, args, kwargs)  # type: ignore[no-untyped-call]
        program = torch.export.export(copied, args, kwargs, dynamic_shapes=shapes)
        return Traced(program, tuple(map(dict, axes)), _output_names(program), metadata, opset)


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """Return a name for each tensor that comes out: ``output``, or what its place in the model's output suggests."""
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    output = pytree.tree_unflatten(specs, program.call_spec.out_spec)
    names = []
    for path, spec in pytree.tree_flatten_with_path(output)[0]:
        if isinstance(spec.arg, TensorArgument):
            name = "_".join(re.findall(r"\w+", pytree.keystr(path)))
            names.append(name if name and not name[0].isdigit() else f"output_{name}".rstrip("_"))
    return tuple(names)


def _metadata(
    model: nn.Module, example: Example, preprocessing: Mapping[str, Any] | None, classes: Sequence[str]
) -> dict[str, str]:
    """Return preprocessing and classes, each as JSON, with the size of the images in the example."""
    images = first_batch(model, example)
    size = None if images is None or images.dim() != 4 else (images.shape[1], images.shape[2], images.shape[3])
    if preprocessing is None:
        preprocessing = preprocessing_of(model, size)[1] if is_configured(model) else {}
    values = {
        **preprocessing,
        **({"input_size": size} if size else {}),
        **({"classes": list(classes)} if classes else {}),
    }
    try:
        return {name: json.dumps(value) for name, value in values.items()}
    except TypeError as error:
        raise UsageError(f"preprocessing and classes are plain values: {error}") from error


def _refuse(check: Check, allowed: float, expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Raise if the file computes something else than the model."""
    on = ", ".join("x".join(map(str, shape)) for shape in check.shapes)
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        left, right = ([list(tensor.shape) for tensor in each] for each in (expected, found))
        raise DysurgeryError(
            f"the file would give outputs of shape {right} for an input of {on}, the model gives {left}"
        )
    if not check.relative_diff <= allowed:
        raise DysurgeryError(
            f"the file would compute something else: for an input of {on} its output differs by "
            f"{check.relative_diff:.1e} of the largest, of which rounding explains {allowed:.0e}"
        )
