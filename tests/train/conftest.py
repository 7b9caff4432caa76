"""A training run in milliseconds."""

import pytest
from tiny import PREPROCESSING, image_data, net

from dysurgery.train.loop import Job
from dysurgery.train.recipe import Augment, Training


@pytest.fixture
def job():
    """Make a training run out of recipe options."""

    def make(model=None, *, augment=None, data=None, **options):
        fields = (
            "temperature",
            "distill",
            "teacher",
            "processes",
            "folder",
            "save_seconds",
            "asked_to_stop",
            "observer",
        )
        own = {name: options.pop(name) for name in fields if name in options}
        how = Training(**{"epochs": 3, "batch_size": 16, "lr": 0.1, **options})
        return Job(
            model=net() if model is None else model,
            data=data or image_data(),
            preprocessing=PREPROCESSING,
            how=how,
            augment=augment or Augment(crop="pad"),
            phase="dynamic",
            seed=0,
            **own,
        )

    return make
