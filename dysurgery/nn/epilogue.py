"""What compiled C does to an output while it has it in registers: the activation that follows, and the next mean.

The network stays what it was. A convolution gets an :class:`Epilogue` (:mod:`dysurgery.nn.links`), which it shares with
the :class:`FusedActivation` that stands where the activation behind it was, and with the dynamic convolution behind
that. Where the convolution runs as one call of C (:func:`dysurgery.nn.execution.in_one_call`), it activates its output,
takes its mean, and says so on the tensor; who gets that very tensor knows that the work is done. Everywhere else, as in
training, in an export or with a static layer in its place, nothing is said and each does its own.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from dysurgery.nn.rows import compiled

ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: 1, nn.ReLU6: 2, nn.Hardswish: 3, nn.SiLU: 4}
"""The activations that C knows, and their numbers in _native.c."""

_NOTE = "_dysurgery_done"
"""The attribute of a tensor, so that neither threads nor calls that share a network can take one another's."""


class _Done:
    """What was done to a tensor beside its convolution, and for whom."""

    __slots__ = ("epilogue", "mean")

    def __init__(self, epilogue: "Epilogue", mean: Tensor | None) -> None:
        self.epilogue = epilogue
        self.mean = mean

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and files of the tensor say nothing, in a type that ``torch.load`` takes."""
        return OrderedDict, ()


class Epilogue:
    """What a dynamic convolution does beside.

    Args:
        activation: number of the activation that follows, see :data:`ACTIVATIONS`; 0 is none.
        averages: whether somebody wants the mean of the output.
    """

    def __init__(self, activation: int, averages: bool) -> None:
        self.activation = activation
        self.averages = averages

    def note(self, y: Tensor, mean: Tensor | None) -> None:
        """Say on y that it is activated, and what its mean (B, C) is, if that was wanted."""
        setattr(y, _NOTE, _Done(self, mean))

    def activated(self, y: Tensor) -> bool:
        """Whether y is activated already."""
        done = self._done(y)
        if done is not None and done.mean is None:
            _forget(y)
        return done is not None

    def mean(self, y: Tensor) -> Tensor | None:
        """Hand out the mean of y over its positions, if it is known."""
        done = self._done(y)
        if done is None:
            return None
        _forget(y)
        return done.mean

    def _done(self, y: Tensor) -> _Done | None:
        done = getattr(y, _NOTE, None)
        return done if type(done) is _Done and done.epilogue is self else None


def _forget(y: Tensor) -> None:
    """Let y be an ordinary tensor again; those inside of a compiled graph have no attributes that could stay."""
    if not compiled():
        delattr(y, _NOTE)


class FusedActivation(nn.Module):
    """Stands where an activation was that the convolution before may have computed; if it has not, this does.

    Args:
        act: the activation.
        epilogue: of the convolution.
    """

    def __init__(self, act: nn.Module, epilogue: Epilogue) -> None:
        super().__init__()
        self.act = act
        self._epilogue = epilogue
        self.train(act.training)

    def forward(self, y: Tensor) -> Tensor:
        """Map y (B, C, *size) to its activation."""
        if self._epilogue.activated(y):
            if self._forward_hooks:  # which may change it
                self._epilogue.mean(y)
            return y
        found: Tensor = self.act(y)
        return found
