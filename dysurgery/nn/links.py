"""What follows what: dynamic convolutions are told which activation and which other one comes next.

:mod:`dysurgery.fuse` reads it from a graph, :mod:`dysurgery.checkpoint` from a folder; :mod:`dysurgery.nn.epilogue` is
what comes of it.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from dysurgery.nn.conv import DynamicConvNd
from dysurgery.nn.epilogue import ACTIVATIONS, Epilogue, FusedActivation


class Link(NamedTuple):
    """What follows a dynamic convolution, and nothing else does: paths in the model."""

    layer: str
    activation: str | None
    """Of the activation behind it."""
    reader: str | None
    """Of the dynamic convolution behind that."""


def connect(model: nn.Module, links: Iterable[Link]) -> None:
    """Let the convolutions of ``model``, in place, do what follows them where they can.

    Raises:
        ValueError: for a path of something else.
        AttributeError: for a path that the model does not have.
    """
    links = list(links)
    for path, count in Counter(link.activation for link in links if link.activation is not None).items():
        if count > 1:  # the one whose output it does not know would be activated twice
            raise ValueError(f"{path} is said to follow two convolutions")
    for link in links:
        layer, act = _layer(model, link.layer), None
        if link.activation is not None:
            act = model.get_submodule(link.activation)
            act = act.act if isinstance(act, FusedActivation) else act
            if type(act) not in ACTIVATIONS:
                raise ValueError(f"{link.activation} is a {type(act).__name__}, no activation that is known")
        reader = None if link.reader is None else _layer(model, link.reader)
        epilogue = layer.epilogue = Epilogue(0 if act is None else ACTIVATIONS[type(act)], reader is not None)
        if reader is not None:
            reader.source = epilogue
        if act is not None and link.activation is not None:
            parent, _, name = link.activation.rpartition(".")
            setattr(model.get_submodule(parent), name, FusedActivation(act, epilogue))


def _layer(model: nn.Module, path: str) -> DynamicConvNd:
    layer = model.get_submodule(path)
    if not isinstance(layer, DynamicConvNd):
        raise ValueError(f"{path} is a {type(layer).__name__}, no dynamic convolution")
    return layer


def links_of(model: nn.Module) -> tuple[Link, ...]:
    """Return what :func:`connect` was told."""
    acts = {id(m._epilogue): path for path, m in model.named_modules() if isinstance(m, FusedActivation)}
    layers = {path: m for path, m in model.named_modules() if isinstance(m, DynamicConvNd)}
    readers = {id(m.source): path for path, m in layers.items() if m.source is not None}
    return tuple(
        Link(path, acts.get(id(m.epilogue)), readers.get(id(m.epilogue)))
        for path, m in layers.items()
        if m.epilogue is not None
    )
