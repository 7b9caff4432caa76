"""What compiled C does to an output while it has it in registers: the activation that follows, and the next mean.

The network stays what it was. A convolution gets an :class:`Epilogue` (:mod:`dysurgery.nn.links`), which it shares with
the :class:`FusedActivation` that stands where the activation behind it was, and with the dynamic convolution behind
that. Where the convolution runs as one call of C (:func:`dysurgery.nn.execution.in_one_call`), it activates its output,
takes its mean, and notes the tensor; who gets that very tensor knows that the work is done. Everywhere else, as in
training, in a compiled graph, in an export or with a static layer in its place, nothing is noted and each does its own.
"""

import weakref
from typing import Any

from torch import Tensor, nn

from dysurgery.nn.rows import eager

ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: 1, nn.ReLU6: 2, nn.Hardswish: 3, nn.SiLU: 4}
"""The activations that C knows, and their numbers in _native.c."""


class Epilogue:
    """What a dynamic convolution does beside, and to which tensor it did.

    Args:
        activation: number of the activation that follows, see :data:`ACTIVATIONS`; 0 is none.
        averages: whether somebody wants the mean of the output.
    """

    def __init__(self, activation: int, averages: bool) -> None:
        self.activation = activation
        self.averages = averages
        self._last: tuple[weakref.ref[Tensor], Tensor | None] | None = None

    def note(self, y: Tensor, mean: Tensor | None) -> None:
        """Remember that y is activated, and its mean (B, C) if that was wanted."""
        self._last = (weakref.ref(y), mean)

    def activated(self, y: Tensor) -> bool:
        """Whether y is what was noted last."""
        last = self._last
        return last is not None and last[0]() is y

    def mean(self, y: Tensor) -> Tensor | None:
        """Hand out the mean of y over its positions, if y is what was noted last; then it is forgotten."""
        last, self._last = self._last, None
        return last[1] if last is not None and last[0]() is y else None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles know of no tensor."""
        return vars(self) | {"_last": None}


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
        if eager() and self._epilogue.activated(y):
            return y
        found: Tensor = self.act(y)
        return found
