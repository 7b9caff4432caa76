"""Another number of classes: a fresh classifier in place of the old one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dysurgery.errors import DysurgeryError, sentence


def outputs_of(model: nn.Module, images: torch.Tensor) -> int:
    """Return the number of outputs of ``model``.

    Raises:
        DysurgeryError: if it does not take ``images`` or does not return one matrix of logits (B, classes).
    """
    training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(images)
    except Exception as error:  # any network, and whatever it raises
        raise DysurgeryError(
            f"{type(model).__name__} does not take {'x'.join(map(str, images.shape[1:]))} images ({sentence(error)}): "
            "give its own size with --input-size, or as the attribute input_size = (channels, height, width)"
        ) from error
    finally:
        model.train(training)
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise DysurgeryError(f"{type(model).__name__} is no classifier: expected logits (B, classes), got {shape}")
    return int(output.shape[1])


def replace_head(model: nn.Module, classes: int, images: torch.Tensor, seed: int) -> str:
    """Give ``model`` a fresh classifier for ``classes`` classes, in place.

    By timm's ``reset_classifier`` where there is one, else by replacing the classifier that the model's
    ``pretrained_cfg`` names, else its last Linear.

    Args:
        model: a classifier.
        classes: the new number.
        images: (B, C, H, W), to see that it worked.
        seed: of the new weights.

    Returns:
        What was replaced, for people to read.

    Raises:
        DysurgeryError: if the model has no such layer.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    named = cfg.get("classifier") if isinstance(cfg, Mapping) else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if callable(reset := getattr(model, "reset_classifier", None)):
            try:
                reset(classes)
            except Exception as error:
                raise DysurgeryError(
                    f"{type(model).__name__}.reset_classifier({classes}): {sentence(error)}"
                ) from error
            done = "reset_classifier"
        else:
            done = _replace_linear(model, classes, named if isinstance(named, str) else None)
    found = outputs_of(model, images)
    if found != classes:
        raise DysurgeryError(
            f"the head of {type(model).__name__} cannot be replaced: after {done} it has {found} outputs, not "
            f"{classes}; build the model with {classes} classes"
        )
    return done


def _replace_linear(model: nn.Module, classes: int, named: str | None) -> str:
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    gates = tuple(f"{path}." for path, m in model.named_modules() if hasattr(m, "tau"))
    linears = {path: m for path, m in linears.items() if not path.startswith(gates)} if gates else linears
    path = named if named in linears else next(reversed(linears), None)
    if not path:
        raise DysurgeryError(
            f"{type(model).__name__} has no Linear to replace for {classes} classes: build it with {classes} classes"
        )
    old: Any = linears[path]
    new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new.to(old.weight.device, old.weight.dtype).train(old.training))
    if hasattr(model, "num_classes"):
        setattr(model, "num_classes", classes)  # noqa: B010 a plain attribute, whatever mypy takes it for
    return path
