"""Products of one row, written as sums under torch.compile for a CPU.

For each matrix product inductor calls a library, which at batch 1 costs more than the arithmetic: four calls a layer.
Sums it fuses, so that attention and aggregation become a few loops. In eager mode, and for an exported graph, a
product stays one operation.
"""

import torch
from torch import Tensor, nn


def product(row: Tensor, matrix: Tensor) -> Tensor:
    """Return row (B, K) @ matrix (K, N), added up over K."""
    if not _fuses(row):
        return row @ matrix
    total = row[:, :1] * matrix[0]
    for k in range(1, matrix.shape[0]):
        total = total + row[:, k : k + 1] * matrix[k]
    return total


def linear(row: Tensor, layer: nn.Linear) -> Tensor:
    """Return layer(row), row (B, N), for a layer with a bias."""
    if not _fuses(row):
        found: Tensor = layer(row)
        return found
    return (row.unsqueeze(1) * layer.weight).sum(dim=-1) + layer.bias


def compiled() -> bool:
    """Whether torch.compile reads this, and not torch.export."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def eager() -> bool:
    """Whether this runs now, as it is written: nobody traces it, transforms it or asks for forward derivatives."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _fuses(row: Tensor) -> bool:
    # Only one row: of more each would read the matrix again.
    return compiled() and row.shape[0] == 1 and row.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
