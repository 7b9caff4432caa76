"""The fastest way of every dynamic layer on this machine: measured, not guessed as by the default chooser.

Where another way than the default is faster, that is an attribute of the layer (:class:`dysurgery.nn.execution.Tuned`),
which copies and :func:`dysurgery.save` keep; it counts for the device, threads, type, layout, shape and mode that were
measured; under torch.compile on a GPU alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from statistics import median

import torch
from torch import nn

from dysurgery.errors import UsageError
from dysurgery.example import Example, run, shadow
from dysurgery.latency import check_seconds, in_turns, no_collection
from dysurgery.layerwise import LAYOUTS, Call, layer_calls, measured_step, twin_of
from dysurgery.nn import duplicate
from dysurgery.nn.conv import DynamicConvNd
from dysurgery.nn.execution import WAYS, Geometry, Situation, Tuned, choose, covers

WORTH = 0.9
"""A way has to take less than this of the default's time: a layer alone finds more in the cache than in a network."""


def autotune(
    model: nn.Module, example: Example, *, train: bool | None = None, seconds: float = 20.0
) -> dict[str, dict[str, str]]:
    """Measure every way of every dynamic convolution for inputs like the example, and let each go its fastest.

    The function stays the same up to rounding. Compiled and exported graphs do not ask.

    Args:
        model: a converted network, changed in place.
        example: what it is called with; its batch size and memory layout count, so tune for each that will be used.
        train: for training steps (forward and backward) or inference; None is the mode that the model is in.
        seconds: to spend on all layers together; equal layers are measured once.

    Returns:
        Path of each layer -> situation (see :class:`dysurgery.nn.execution.Situation`) -> way.

    Raises:
        UsageError: for a model without dynamic convolutions, or no time.
        DysurgeryError: if it does not run on the example.
    """
    check_seconds(seconds)
    train = model.training if train is None else train
    copied = shadow(model)  # as a forward in training would move statistics
    calls = layer_calls(copied, lambda: run(copied, example))
    sites = [
        (path, layer, replace(call, needs_grad=train))
        for path, seen in calls.items()
        if isinstance(layer := model.get_submodule(path), DynamicConvNd)
        for call in dict.fromkeys(seen)
    ]
    if not sites:
        raise UsageError("no dynamic convolution is called on the example: convert the model first (dysurgery.convert)")
    keys = [_key(layer, call) for _, layer, call in sites]
    share = seconds / len(set(keys))
    known: dict[tuple[object, ...], tuple[Situation, str, str]] = {}
    found: dict[str, dict[Situation, tuple[str, str]]] = {}
    with no_collection():
        for (path, layer, call), key in zip(sites, keys, strict=True):
            if key not in known:
                known[key] = _fastest(layer, call, train, share)
            situation, way, default = known[key]
            found.setdefault(path, {})[situation] = (way, default)
    for path, measured in found.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, DynamicConvNd)
        before = layer.chooser.ways if isinstance(layer.chooser, Tuned) else {}
        kept = {situation: way for situation, way in before.items() if situation not in measured}
        better = {situation: way for situation, (way, default) in measured.items() if way != default}
        vars(layer).pop("chooser", None)  # the default asks for less, and at batch 1 every microsecond counts
        if kept or better:
            layer.chooser = Tuned(kept | better)
    return {path: {str(situation): way for situation, (way, _) in each.items()} for path, each in found.items()}


def check_compiled(device: torch.device, autotune: bool, compile: bool) -> None:
    """Refuse to measure for a compiled network of a CPU.

    Raises:
        UsageError: as it would be in vain.
    """
    if autotune and compile and device.type == "cpu":
        raise UsageError(
            "on a CPU a compiled network does not ask for what was measured: autotune or compile, not both"
        )


def ways_of(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return path of each tuned layer -> situation -> way, as plain values."""
    return {
        path: {str(situation): way for situation, way in layer.chooser.ways.items()}
        for path, layer in model.named_modules()
        if isinstance(layer, DynamicConvNd) and isinstance(layer.chooser, Tuned)
    }


def set_ways(model: nn.Module, ways: Mapping[str, Mapping[str, str]]) -> None:
    """Let the layers of ``model`` go the ways that :func:`ways_of` returned.

    Raises:
        ValueError: for a path that is no dynamic convolution, or a situation that is none.
    """
    for path, each in ways.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, DynamicConvNd):
            raise ValueError(f"{path} has ways to run, but is no dynamic convolution")
        layer.chooser = Tuned({Situation.parse(situation): way for situation, way in each.items()})


def _key(layer: DynamicConvNd, call: Call) -> tuple[object, ...]:
    """Return what layers have in common that take the same time."""
    geometry = (layer.weight_shape, layer.stride, layer.padding, layer.dilation, layer.groups, layer.transposed)
    return type(layer), *geometry, layer.padding_mode, layer.k, layer.bias_bank is None, call


def _fastest(original: DynamicConvNd, call: Call, train: bool, seconds: float) -> tuple[Situation, str, str]:
    """Return the situation that ``original`` is in when called like that, its fastest way then, and the default."""
    mode = "train" if train else "infer"
    layer = duplicate(original).train(train)  # whose gradients may be cleared
    for module in layer.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    x = call.inputs()
    asked: list[tuple[Situation, list[str], str]] = []

    def ask(x: torch.Tensor, geometry: Geometry, train: bool = False) -> str:
        ways = [way for way in WAYS if way != "one by one" and covers(way, x, geometry)]
        asked.append((Situation.of(x, train), ways, choose(x, geometry, train)))
        return asked[-1][-1]

    steps = {}
    layer.chooser = ask
    measured_step(mode, layer, layer, [x])()
    situation, ways, default = asked[0]
    for way in ways:
        twin = twin_of(layer)
        assert isinstance(twin, DynamicConvNd)
        twin.chooser = lambda x, geometry, train=False, way=way: way  # type: ignore[misc]
        with torch.no_grad():
            kept = twin(x).is_contiguous(memory_format=LAYOUTS[call.layout]) if x.dim() == 4 else True
        # What comes out in another layout makes the layers behind it slower, which cannot be seen here.
        if kept or way == default:
            steps[way] = measured_step(mode, twin, twin, [x])
    times = {way: median(found) for way, found in in_turns(steps, x.device, seconds=seconds).items()}
    best = min(times, key=lambda way: times[way])
    return situation, best if times[best] < WORTH * times[default] else default, default
