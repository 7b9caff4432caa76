"""Reparametrised modules made plain: what computes a weight before each call becomes that weight.

``weight_norm``, ``spectral_norm`` and pruning of :mod:`torch.nn.utils`, the parametrizations of
:mod:`torch.nn.utils.parametrize` too. Training goes on without them, so folding needs a person's consent.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dysurgery.nn.copying import duplicate


def is_reparametrised(module: nn.Module) -> bool:
    """Whether a tensor of ``module`` is computed anew for each call by torch's own means."""
    return parametrize.is_parametrized(module) or any(map(_computes, module._forward_pre_hooks.values()))


def folded(module: nn.Module) -> nn.Module:
    """Return a plain copy of ``module`` with the weights that it has in eval mode; a plain module as it is."""
    if not is_reparametrised(module):
        return module
    plain: nn.Module = duplicate(module).eval()
    if parametrize.is_parametrized(plain):
        # torch's remove_parametrizations takes the tensor from the class, which copies share with their original.
        with torch.no_grad():
            values = {name: getattr(plain, name).clone() for name in plain.get_submodule("parametrizations")._modules}
        del plain._modules["parametrizations"]
        plain.__class__ = type(plain).__bases__[0]
        for name, value in values.items():
            trained = any(p.requires_grad for p in module.get_submodule(f"parametrizations.{name}").parameters())
            plain.register_parameter(name, nn.Parameter(value, requires_grad=trained))
    for hook in list(plain._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(plain, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(plain, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(plain, hook._tensor_name)  # type: ignore[no-untyped-call]
    _drop_left_behind(plain)
    return plain.train(module.training)


def _drop_left_behind(plain: nn.Module) -> None:
    """Drop the hooks that look for the removed tensors in a state_dict, which torch's own functions leave behind."""
    for hooks in (plain._load_state_dict_pre_hooks, plain._state_dict_hooks):
        for key, hook in list(hooks.items()):
            function = getattr(hook, "hook", hook)
            if (getattr(function, "__module__", None) or "").startswith("torch.nn.utils."):
                del hooks[key]


def _computes(hook: object) -> bool:
    return isinstance(hook, WeightNorm | SpectralNorm | prune.BasePruningMethod)
