"""Fine-tuning, and the honest comparison that it needs.

A recipe (:mod:`recipe`) is run as an experiment (:mod:`experiment`): the network is given a head for the data
(:mod:`head`), converted, its attention calibrated, and trained (:mod:`loop`) beside its control. A training run reads
batches (:mod:`data`), has parameter groups that make up for what K kernels do to the learning rate (:mod:`groups`),
watches its attention (:mod:`attention`), keeps its :mod:`state`, and may be one of several :mod:`processes`.
:mod:`curves` draws what happened.
"""

from dysurgery.train.data import Data, open_data, open_images
from dysurgery.train.experiment import Outcome, SeedOutcome, finetune
from dysurgery.train.groups import parameter_groups
from dysurgery.train.loop import Epoch, Interrupted, Observer, Step
from dysurgery.train.recipe import Recipe, load_recipe, recipe_names

__all__ = [
    "Data",
    "Epoch",
    "Interrupted",
    "Observer",
    "Outcome",
    "Recipe",
    "SeedOutcome",
    "Step",
    "finetune",
    "load_recipe",
    "open_data",
    "open_images",
    "parameter_groups",
    "recipe_names",
]
