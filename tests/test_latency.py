import time

import pytest
import torch
from torch import nn

from dysurgery.latency import latency


class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.calls = seconds, []

    def forward(self, x):
        time.sleep(self.seconds)
        self.calls.append(self.training)
        return x


def test_medians_in_milliseconds_measured_in_turns_and_in_eval_mode():
    models = {"quick": Slow(0.001), "slow": Slow(0.02)}
    found = latency(models, torch.zeros(1), seconds=0.2)
    assert found["slow"] == pytest.approx(20, rel=0.5)
    assert found["slow"] > 3 * found["quick"]
    assert len(models["quick"].calls) == len(models["slow"].calls) >= 6
    assert not any(models["quick"].calls)
    assert models["quick"].training
