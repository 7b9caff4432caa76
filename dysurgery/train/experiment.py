"""Does the dynamic network beat the static one that is trained on for just as long.

An existing network is made (or was), converted, and trained on with the tau warmup; beside it the control, the same
static network trained on with the same recipe, seed and data order.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from dysurgery.cost import CostReport, cost
from dysurgery.rewrite import convert
from dysurgery.train.digits import INPUT_SIZE, NarrowNet, digits
from dysurgery.train.loop import Epoch, evaluate, train
from dysurgery.train.recipe import Recipe


@dataclass(frozen=True)
class Outcome:
    """What an experiment found; accuracies in percent on the validation images.

    Attributes:
        before: of the existing network.
        converted: right after the conversion; the same.
        control: of the static network after the further epochs.
        dynamic: of the dynamic network after as many.
        costs: of the static and the dynamic network.
        seconds: that the control's and the dynamic network's training took.
        history: every epoch of every run.
        model: the dynamic network.
        val_images: number of validation images: one is 100 / val_images points.
    """

    before: float
    converted: float
    control: float
    dynamic: float
    costs: tuple[CostReport, CostReport]
    seconds: tuple[float, float]
    history: tuple[Epoch, ...]
    model: nn.Module
    val_images: int

    @property
    def difference(self) -> float:
        """Dynamic minus control, in points."""
        return self.dynamic - self.control


def run_recipe(recipe: Recipe, on_epoch: Callable[[Epoch], None] = lambda epoch: None) -> Outcome:
    """Run ``recipe`` from the beginning; the global random state is left alone.

    Raises:
        UsageError: for a conversion that the recipe asks for wrongly.
        DysurgeryError: if training fails.
    """
    train_data, val_data = digits()
    example = torch.zeros(1, *INPUT_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        static = NarrowNet()
        history = train(
            static, train_data, val_data, recipe.pretrain, phase="before", seed=recipe.seed, on_epoch=on_epoch
        )
        before = history[-1].accuracy
        dynamic = convert(static, example, seed=recipe.seed, **asdict(recipe.surgery))
        converted = evaluate(dynamic, val_data)

        control, seconds = copy.deepcopy(static), []
        for model, phase, temperature in ((control, "control", None), (dynamic, "dynamic", recipe.temperature)):
            began = time.perf_counter()
            history += train(
                model,
                train_data,
                val_data,
                recipe.finetune,
                phase=phase,
                seed=recipe.seed + 1,
                temperature=temperature,
                on_epoch=on_epoch,
            )
            seconds.append(time.perf_counter() - began)
    last = {epoch.phase: epoch.accuracy for epoch in history}
    return Outcome(
        before=before,
        converted=converted,
        control=last["control"],
        dynamic=last["dynamic"],
        costs=(cost(static, example), cost(dynamic, example)),
        seconds=(seconds[0], seconds[1]),
        history=tuple(history),
        model=dynamic,
        val_images=len(val_data),
    )
