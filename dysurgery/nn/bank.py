"""K kernels out of one: the starts that leave the layer's function as it was.

In comes a static weight, out goes the bank (K, weights of one kernel). With the weights pi of a fresh gate the mixed
kernel ``sum_k pi_k W_k`` equals the static weight. A new start is a function in :data:`STARTS`. Plain independent
noise is not offered: it does not preserve the function.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dysurgery.errors import UsageError, did_you_mean
from dysurgery.nn.attention import Gate

DEFAULT_SPREAD = 0.5


def copies(weight: Tensor, k: int, spread: float) -> Tensor:
    """K equal kernels: exact for any pi that sums to one, so the attention may start random. ``spread`` is unused."""
    return weight.reshape(1, -1).repeat(k, 1)


def zero_sum(weight: Tensor, k: int, spread: float) -> Tensor:
    """``W_k = W + e_k`` with ``sum_k e_k = 0``: exact while pi is uniform; std(e_k) is ``spread`` times std(W)."""
    noise = torch.randn(k, weight.numel(), device=weight.device, dtype=weight.dtype)
    noise -= noise.mean(dim=0)
    # Centring K draws takes 1/K of their variance away.
    scale = spread * weight.std(correction=0) * (k / max(k - 1, 1)) ** 0.5
    bank: Tensor = weight.reshape(1, -1) + scale * noise
    return bank


STARTS: dict[str, Callable[[Tensor, int, float], Tensor]] = {"copies": copies, "zero-sum": zero_sum}


def default_start(gate: type[Gate]) -> str:
    """Return the start for this kind of gate when none is named."""
    return "copies" if gate.sums_to_one else "zero-sum"


def check_start(start: str, gate: type[Gate]) -> None:
    """Refuse a start that would change the function under this kind of gate.

    Raises:
        UsageError: for an unknown start, or ``copies`` under a gate whose weights do not sum to one.
    """
    if start not in STARTS:
        raise UsageError(f"unknown start {start!r}: expected one of {', '.join(STARTS)}{did_you_mean(start, STARTS)}")
    if start == "copies" and not gate.sums_to_one:
        raise UsageError(
            f"start 'copies' cannot preserve the function under the {gate.name} gate: its random attention gives "
            "weights that do not sum to 1; use start 'zero-sum' (constant attention, kernels scaled to match)"
        )


def fill(
    bank: Tensor,
    bias_bank: Tensor | None,
    gate: Gate,
    weight: Tensor,
    bias: Tensor | None,
    start: str,
    spread: float,
) -> None:
    """Fill the bank (K, N) and the bias bank (K, Cout) so that the layer computes what ``weight`` and ``bias`` did.

    Under ``zero-sum`` the gate's last layer is set to zero. Where its constant weights sum to s and not to 1
    (sigmoid: s = K / 2), all kernels are divided by s.

    Raises:
        UsageError: see :func:`check_start`.
    """
    check_start(start, type(gate))
    k = bank.shape[0]
    with torch.no_grad():
        if start != "copies":
            gate.silence()
        z = torch.zeros(1, k, dtype=torch.float64, device="cpu")  # also under a default device without storage
        total = gate.weights(z, z.new_ones(())).sum().item()
        bank.copy_(STARTS[start](weight.detach(), k, spread) / total)
        if bias_bank is not None and bias is not None:
            bias_bank.copy_(copies(bias.detach(), k, 0.0) / total)
