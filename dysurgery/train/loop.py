"""One training run: a model, its data and how to train it; out comes its accuracy after every epoch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dysurgery.errors import DysurgeryError
from dysurgery.nn import TemperatureSchedule, set_temperature
from dysurgery.train.groups import parameter_groups
from dysurgery.train.recipe import Training


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        phase: which of the runs of an experiment.
        number: from 1 to ``of``.
        of: number of epochs.
        loss: mean training loss (cross-entropy, nats).
        accuracy: on the validation images, percent.
        lr: learning rate of the first group.
        tau: temperature at its last step; None for a static network.
    """

    phase: str
    number: int
    of: int
    loss: float
    accuracy: float
    lr: float
    tau: float | None


def train(
    model: nn.Module,
    train_data: Dataset[Any],
    val_data: Dataset[Any],
    how: Training,
    *,
    phase: str,
    seed: int,
    temperature: TemperatureSchedule | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train ``model`` in place.

    Args:
        model: static or dynamic.
        train_data: pairs of image and class.
        val_data: the same.
        how: epochs, optimizer and so on.
        phase: a name for the epochs.
        seed: of the data order, so that two models see the same batches.
        temperature: sets tau before every step, as a function of the epochs done; None leaves it alone.
        on_epoch: called after every epoch.

    Raises:
        DysurgeryError: if the loss is not finite; it names the step, lr and tau.
    """
    loader = DataLoader(
        train_data, how.batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed)
    )
    if not len(loader):
        raise DysurgeryError(f"fewer training images than one batch of {how.batch_size}: choose a smaller batch_size")
    groups = parameter_groups(model, how.opt, how.lr, how.weight_decay)
    optimizer = create_optimizer_v2(groups, opt=how.opt, lr=how.lr, weight_decay=0.0, momentum=how.momentum)
    scheduler, _ = create_scheduler_v2(optimizer, sched=how.sched, num_epochs=how.epochs)
    history = []
    for epoch in range(how.epochs):
        model.train()
        total, tau = 0.0, None
        for step, (images, classes) in enumerate(loader):
            if temperature is not None:
                tau = temperature(epoch + step / len(loader))
                set_temperature(model, tau)
            loss = F.cross_entropy(model(images), classes)
            if not math.isfinite(loss.item()):
                raise DysurgeryError(
                    f"the loss is {loss.item()} in epoch {epoch + 1}, step {step + 1} (lr {_rate(optimizer):.3g}, "
                    f"tau {tau if tau is not None else '-'}): lower the learning rate"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
        if temperature is not None:
            set_temperature(model, temperature(epoch + 1))
        accuracy = evaluate(model, val_data)
        history.append(Epoch(phase, epoch + 1, how.epochs, total / len(loader), accuracy, _rate(optimizer), tau))
        on_epoch(history[-1])
        if scheduler is not None:
            scheduler.step(epoch + 1)
    return history


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def evaluate(model: nn.Module, data: Dataset[Any]) -> float:
    """Return the accuracy of ``model`` on ``data`` in percent; it is left in eval mode."""
    model.eval()
    right = count = 0
    with torch.no_grad():
        for images, classes in DataLoader(data, 256):
            right += int((model(images).argmax(dim=1) == classes).sum())
            count += len(classes)
    return 100.0 * right / count
