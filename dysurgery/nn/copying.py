"""Copies of modules that hold what their forward computed."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

Module = TypeVar("Module", bound=nn.Module)


def duplicate(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """Return ``copy.deepcopy(module, memo)``, also where it holds tensors that are part of an autograd graph.

    ``weight_norm``, ``spectral_norm`` and pruning keep the computed weight in an attribute, many networks their last
    features: :func:`copy.deepcopy` refuses those. Here their values are copied.
    """
    memo = {} if memo is None else memo
    for part in module.modules():
        for leaf in pytree.tree_leaves({k: v for k, v in vars(part).items() if k not in ("_modules", "_parameters")}):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo.setdefault(id(leaf), leaf.detach().clone())
    return copy.deepcopy(module, memo)
