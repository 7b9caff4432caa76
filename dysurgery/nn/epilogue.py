"""What compiled C does to an output while it has it in registers: the activation that follows, and the next mean.

The network stays what it was. A convolution gets an :class:`Epilogue` (:mod:`dysurgery.nn.links`), which it shares with
the :class:`FusedActivation` that stands where the activation behind it was, and with the dynamic convolution behind
that. Where the convolution runs as one call of C (:func:`dysurgery.nn.execution.in_one_call`), it activates its output,
takes its mean, and notes the tensor; who gets that very tensor knows that the work is done. Everywhere else, as in
training, in an export or with a static layer in its place, nothing is noted and each does its own.
"""

import weakref
from typing import Any

from torch import Tensor, nn

from dysurgery.nn.rows import compiled

ACTIVATIONS: dict[type[nn.Module], int] = {nn.ReLU: 1, nn.ReLU6: 2, nn.Hardswish: 3, nn.SiLU: 4}
"""The activations that C knows, and their numbers in _native.c."""


class Epilogue:
    """What a dynamic convolution does beside, and what it did last.

    In eager mode it knows the tensor to which that was done. A compiled graph knows no tensors by their identity: there
    the note is for whoever asks next, and is gone then.

    Args:
        activation: number of the activation that follows, see :data:`ACTIVATIONS`; 0 is none.
        averages: whether somebody wants the mean of the output.
    """

    def __init__(self, activation: int, averages: bool) -> None:
        self.activation = activation
        self.averages = averages
        self._done = False
        self._mean: Tensor | None = None
        self._output: weakref.ref[Tensor] | None = None

    def note(self, y: Tensor, mean: Tensor | None) -> None:
        """Remember that y is activated, and its mean (B, C) if that was wanted."""
        self._done, self._mean = True, mean
        self._output = None if compiled() else weakref.ref(y)

    def forget(self) -> None:
        """Do as if nothing had been done."""
        self._done, self._mean, self._output = False, None, None

    @property
    def noted(self) -> bool:
        """Whether there is something that nobody has asked for."""
        return self._done or self._mean is not None

    def activated(self, y: Tensor) -> bool:
        """Whether y is activated already."""
        if not compiled() and self._output is not None:
            known = self._output() is y
            self._done = self._done and not known
            return known
        done = self._done
        if done:
            self._done = False
        return done

    def mean(self, y: Tensor) -> Tensor | None:
        """Hand out the mean of y over its positions, if it is known."""
        mean = self._mean
        if mean is None:
            return None
        self._mean = None
        other = not compiled() and self._output is not None and self._output() is not y
        return None if other or mean.shape != y.shape[:2] else mean

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles know of nothing that was done."""
        return vars(self) | {"_done": False, "_mean": None, "_output": None}


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
            return y
        found: Tensor = self.act(y)
        return found
