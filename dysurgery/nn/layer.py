"""What every dynamic layer shares: a bank of K kernels, a gate, and the way from a static module to itself.

:class:`DynamicLayer` is what the rest of the library recognises: the tracer as a leaf, the counter by its formula,
the checkpoint by :meth:`DynamicLayer.options`.
"""

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dysurgery.errors import UsageError
from dysurgery.nn import bank
from dysurgery.nn.attention import gate_class

WAS_DYNAMIC, BIAS_ADDED = MARKS = "was_dynamic", "bias_added"
"""Attributes that are set on a layer for :mod:`dysurgery.checkpoint`: it was dynamic once, it got a bias it had not."""


class DynamicLayer(nn.Module):
    """A bank (K, weights of one kernel), a bias bank (K, Cout) or None, and a gate over the input's channels.

    The bank is a matrix, whatever the kernel's shape: mixing is then one matrix product, and
    ``model.to(memory_format=torch.channels_last)`` leaves it alone (a 5-D parameter would make it fail).

    Args:
        channels: channels of the input, which the gate sees pooled.
        weight_shape: shape of one static weight.
        bias: whether there is a bias bank.
        out_channels: Cout, the width of the bias bank.
        k: number of kernels K, at least 1.
        reduction: see :class:`dysurgery.nn.Gate`.
        gate: a name in :data:`dysurgery.nn.attention.GATES`.
        device: where the parameters live.
        dtype: their type.

    Raises:
        UsageError: for k or reduction below 1, or an unknown gate.
    """

    replaces: ClassVar[type[nn.Module]]
    """The static class whose instances this layer can stand for, see :func:`dysurgery.nn.handlers.handler`."""

    exact_starts: ClassVar[tuple[str, ...]] = tuple(bank.STARTS)
    """The starts that preserve the function of this kind of layer."""

    kept: ClassVar[tuple[str, ...]] = ()
    """Parameters beside weight and bias, which the K kernels share as the static layer has them."""

    transposed: bool = False
    """Whether the kernels are (Cin, Cout/groups, ...) and spread each input over the output."""

    bias_bank: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        weight_shape: tuple[int, ...],
        bias: bool,
        *,
        out_channels: int,
        k: int,
        reduction: int,
        gate: str,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if k < 1 or reduction < 1:
            raise UsageError(f"k and reduction are at least 1, got k={k}, reduction={reduction}")
        super().__init__()
        self.k = k
        self.weight_shape = weight_shape
        self.out_channels = out_channels
        self.bank = nn.Parameter(torch.empty(k, math.prod(weight_shape), device=device, dtype=dtype))
        if bias:
            self.bias_bank = nn.Parameter(torch.empty(k, out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias_bank", None)
        self.gate = gate_class(gate)(channels, k, reduction, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw K independent kernels as :class:`torch.nn.Conv2d` and ``Linear`` draw one, and a fresh attention."""
        fan_in = math.prod(self.weight_shape[1:])
        bound = 1.0 / math.sqrt(fan_in) if fan_in else 0.0
        nn.init.uniform_(self.bank, -bound, bound)
        if self.bias_bank is not None:
            nn.init.uniform_(self.bias_bank, -bound, bound)
        self.gate.fc1.reset_parameters()
        self.gate.fc2.reset_parameters()

    @classmethod
    def like(cls, static: nn.Module, *, k: int, reduction: int = 4, gate: str = "softmax") -> Self:
        """Return a dynamic layer with the geometry, device and dtype of ``static``, freshly initialised."""
        raise NotImplementedError

    @classmethod
    def from_static(
        cls,
        static: nn.Module,
        *,
        k: int,
        reduction: int = 4,
        gate: str = "softmax",
        start: str | None = None,
        spread: float = bank.DEFAULT_SPREAD,
    ) -> Self:
        """Return a dynamic layer that computes what ``static`` does.

        Geometry, device, dtype, requires_grad and train or eval mode carry over. Draws from the global generator.

        Args:
            static: an instance of :attr:`replaces`.
            k: number of kernels K.
            reduction: see :class:`dysurgery.nn.Gate`.
            gate: a name in :data:`dysurgery.nn.attention.GATES`.
            start: a name in :data:`dysurgery.nn.bank.STARTS`; by default ``copies``, or ``zero-sum`` where the gate's
                weights do not sum to one.
            spread: size of the zero-sum noise, as a multiple of the weight's standard deviation.

        Raises:
            UsageError: for an option out of range, or a start that would change the function under this gate.
        """
        start = start or bank.default_start(gate_class(gate))
        bank.check_start(start, gate_class(gate))
        if start not in cls.exact_starts:
            raise UsageError(
                f"start {start!r} does not preserve what a {cls.replaces.__name__} computes: use start 'copies' with "
                "the softmax gate, or exclude these layers"
            )
        layer = cls.like(static, k=k, reduction=reduction, gate=gate)
        weight, bias = static.get_parameter("weight"), static._parameters["bias"]
        bank.fill(layer.bank, layer.bias_bank, layer.gate, weight, bias, start, spread)
        layer.bank.requires_grad_(weight.requires_grad)
        layer.gate.requires_grad_(weight.requires_grad)
        if layer.bias_bank is not None and bias is not None:
            layer.bias_bank.requires_grad_(bias.requires_grad)
        with torch.no_grad():
            for name in cls.kept:
                parameter = static.get_parameter(name)
                layer.get_parameter(name).requires_grad_(parameter.requires_grad).copy_(parameter)
        return layer.train(static.training)

    def plain(self) -> nn.Module:
        """Return a static layer of the same geometry and type without storage, which convolves with its weight as is.

        That is an instance of :attr:`replaces`, unless that class transforms its weight first.
        """
        raise NotImplementedError

    def to_static(self, pi: Tensor | None = None) -> nn.Module:
        """Return the static layer with the kernel ``sum_k pi_k W_k``, marked as :data:`WAS_DYNAMIC`.

        Type, device, requires_grad and train or eval mode carry over.

        Args:
            pi: (K,) constant weights; None are those of an attention that says nothing (z = 0), all equal.

        Raises:
            UsageError: if pi is not of shape (K,).
        """
        if pi is None:
            z = torch.zeros(1, self.k, dtype=torch.float64, device="cpu")
            pi = self.gate.weights(z, z.new_ones(()))[0]
        if pi.shape != (self.k,):
            raise UsageError(f"{self.k} kernels take as many weights, got a tensor of shape {tuple(pi.shape)}")
        static = self.plain().to_empty(device=self.bank.device)
        pi = pi.detach().cpu().double()
        with torch.no_grad():
            for name, mixed in (("weight", self.kernels()), ("bias", self.bias_bank)):
                if mixed is not None:
                    parameter = static.get_parameter(name)
                    parameter.copy_((pi @ mixed.detach().cpu().double()).view(parameter.shape))
                    parameter.requires_grad_(self.bank.requires_grad)
        vars(static)[WAS_DYNAMIC] = True
        return static.train(self.training)

    def kernels(self) -> Tensor:
        """Return the kernels that are mixed, (K, weights of one kernel): the bank, unless the layer transforms it."""
        bank: Tensor = self._own("bank")
        return bank

    def _own(self, name: str) -> Any:
        """Return a parameter without the detour of an attribute, which in a small layer costs as much as the rest."""
        own = self._parameters
        return own[name] if name in own else getattr(self, name)

    def own_attributes(self) -> set[str]:
        """Return the attributes that describe this layer and would mean nothing on a static one in its place."""
        return {"k", "weight_shape", "out_channels"} | {name for name in vars(self) if hasattr(type(self), name)}

    def options(self) -> dict[str, Any]:
        """Return the arguments that :meth:`like` needs to build this layer again."""
        return {"k": self.k, "reduction": self.gate.reduction, "gate": self.gate.name}

    def extra_repr(self) -> str:
        return f"k={self.k}, weight_shape={self.weight_shape}, bias={self.bias_bank is not None}"
