"""The gate: a small attention that turns a layer's pooled input into the weights pi of its K kernels.

In comes the pooled descriptor (B, C), out go the weights pi (B, K). A new gate is a subclass of :class:`Gate`
with its own :meth:`Gate.weights`, entered in :data:`GATES`; nothing else needs to know of it.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dysurgery.errors import UsageError, did_you_mean
from dysurgery.nn import native
from dysurgery.nn.rows import linear

# Below four hidden units K = 4 logits cannot vary independently; the paper's networks never go there.
MIN_HIDDEN = 4


class Gate(nn.Module):
    """``z = FC2(ReLU(FC1(descriptor)))``, then ``pi = weights(z, tau)`` (Chen et al., CVPR 2020, section 3).

    No normalisation inside: it would fail for one sample. The arithmetic of the last step is at least float32.

    Args:
        channels: width C of the descriptor.
        k: number of kernels K.
        reduction: FC1 maps C to ``max(4, C // reduction)``.
        device: where the parameters live.
        dtype: their type.
    """

    name: ClassVar[str]
    sums_to_one: ClassVar[bool]
    """Whether sum_k pi_k = 1 for every z and tau."""

    tau: Tensor

    def __init__(self, channels: int, k: int, reduction: int = 4, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        hidden = max(MIN_HIDDEN, channels // reduction)
        self.reduction = reduction
        self.fc1 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, k, device=device, dtype=dtype)
        self.register_buffer("tau", torch.ones((), device=device, dtype=dtype))

    @staticmethod
    def weights(z: Tensor, tau: Tensor) -> Tensor:
        """Map logits z (B, K) at temperature tau to weights pi (B, K); all K are equal, for any tau, where z = 0."""
        raise NotImplementedError

    def forward(self, descriptor: Tensor) -> Tensor:
        """Map the pooled input (B, C) to pi (B, K), in float32 or wider."""
        own = self.plain_parameters()
        if own is not None and native.computes(descriptor, *own):
            return native.gate(descriptor, own, sigmoid=self.name == "sigmoid")
        z = linear(F.relu(linear(descriptor, self.fc1)), self.fc2)
        dtype = torch.promote_types(z.dtype, torch.float32)
        return self.weights(z.to(dtype), self.tau.to(dtype))

    def plain_parameters(self) -> tuple[Tensor, ...] | None:
        """Return what compiled C needs, if it knows this gate, whose layers are torch's own and not listened to.

        That is weight and bias of FC1, those of FC2, and tau, of any type and layout.
        """
        if type(self) not in _IN_C:  # a subclass may compute something else
            return None
        modules = self._modules  # the attributes would take longer than the arithmetic
        fc1: Any = modules["fc1"]
        fc2: Any = modules["fc2"]
        if type(fc1) is not nn.Linear or type(fc2) is not nn.Linear:
            return None
        if fc1._forward_hooks or fc1._forward_pre_hooks or fc2._forward_hooks or fc2._forward_pre_hooks:
            return None
        first, second, tau = fc1._parameters, fc2._parameters, self._buffers["tau"]
        own: tuple[Any, ...] = (first["weight"], first["bias"], second["weight"], second["bias"], tau)
        return None if own[1] is None or own[3] is None else own

    def silence(self) -> None:
        """Set FC2 to zero, in place: z = 0, so pi is constant until training moves it."""
        with torch.no_grad():
            self.fc2.weight.zero_()
            self.fc2.bias.zero_()

    def extra_repr(self) -> str:
        return f"tau={self.tau.item():g}" if self.tau.device.type != "meta" else ""


class SoftmaxGate(Gate):
    """``pi = softmax(z / tau)``: non-negative and summing to one (Chen et al., section 3)."""

    name = "softmax"
    sums_to_one = True

    @staticmethod
    def weights(z: Tensor, tau: Tensor) -> Tensor:
        return torch.softmax(z / tau, dim=-1)


class SigmoidGate(Gate):
    """``pi_k = sigmoid(z_k / tau)``: independent weights, as in CondConv (Yang et al., NeurIPS 2019)."""

    name = "sigmoid"
    sums_to_one = False

    @staticmethod
    def weights(z: Tensor, tau: Tensor) -> Tensor:
        return torch.sigmoid(z / tau)


GATES: dict[str, type[Gate]] = {gate.name: gate for gate in (SoftmaxGate, SigmoidGate)}
_IN_C = frozenset((SoftmaxGate, SigmoidGate))
"""The gates that :mod:`dysurgery.nn.native` knows, by their names."""


def gate_class(name: str) -> type[Gate]:
    """Return the gate called ``name``.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in GATES:
        raise UsageError(f"unknown gate {name!r}: expected one of {', '.join(GATES)}{did_you_mean(name, GATES)}")
    return GATES[name]
