"""Fine-tuning, and the honest comparison that it needs.

A recipe (:mod:`recipe`) is run as an experiment (:mod:`experiment`) of several training runs (:mod:`loop`), whose
parameter groups (:mod:`groups`) make up for what K kernels do to the learning rate. The embedded data and network are
in :mod:`digits`.
"""

from dysurgery.train.experiment import Outcome, run_recipe
from dysurgery.train.groups import parameter_groups
from dysurgery.train.loop import Epoch
from dysurgery.train.recipe import Recipe, load_recipe, recipe_names

__all__ = ["Epoch", "Outcome", "Recipe", "load_recipe", "parameter_groups", "recipe_names", "run_recipe"]
