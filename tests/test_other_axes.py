"""Networks over other axes than an image's two: recordings, clips, and what upsamples."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dysurgery
from dysurgery.nn import DynamicLayer


class Recordings(nn.Module):
    """Raw audio (B, L) to classes, as in M5 (Dai et al., arXiv 1610.00087), smaller."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv1d(1, 8, 16, stride=4), nn.BatchNorm1d(8)
        self.block = nn.Sequential(nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=8), nn.Conv1d(8, 16, 1), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.block(self.norm(self.stem(x.unsqueeze(1)))).mean(2))


class Clips(nn.Module):
    """Video (B, 3, T, H, W) to classes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 6, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2))
        self.spatial, self.temporal = nn.Conv3d(6, 8, (1, 3, 3), bias=False), nn.Conv3d(8, 8, (3, 1, 1), groups=2)
        self.norm, self.head = nn.BatchNorm3d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.temporal(self.spatial(self.stem(x))))).mean((2, 3, 4)))


class Upsamples(nn.Module):
    """An image to a mask of its size, as in a U-Net."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, bias=False)
        self.head = nn.Conv2d(12, 1, 1)

    def forward(self, x):
        x = self.stem(x)
        up = self.up(torch.relu(self.down(x)), output_size=x.shape[2:])
        return self.head(torch.cat([x, up], 1))


CASES = {
    "recordings": (Recordings, (200,), 2),
    "clips": (Clips, (3, 5, 12, 12), 2),
    "upsamples": (Upsamples, (3, 11, 12), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_all_but_the_first_convolution_becomes_dynamic_and_computes_what_it_did(case, tmp_path):
    network, shape, expected = CASES[case]
    model, x = network().double().eval(), torch.randn(4, *shape, dtype=torch.float64)
    dynamic = dysurgery.convert(model, x[:1])
    assert sum(isinstance(module, DynamicLayer) for module in dynamic.modules()) == expected
    for mode in (False, True):
        torch.testing.assert_close(dynamic.train(mode)(x), model.train(mode)(x), rtol=1e-10, atol=1e-10)
    dysurgery.save(dynamic, tmp_path / "saved")
    again = dysurgery.load(tmp_path / "saved", model=network())
    torch.testing.assert_close(again(x), dynamic.eval()(x), rtol=0, atol=0)
    dynamic.train()(x).square().sum().backward()
    assert all(m.bank.grad.abs().sum() > 0 for m in dynamic.modules() if isinstance(m, DynamicLayer))


@pytest.mark.parametrize("case", CASES)
def test_its_cost_is_predicted_and_counted_per_sample_as_torch_counts(case):
    network, shape, _ = CASES[case]
    model = network().eval()
    plan = dysurgery.plan(model, torch.randn(1, *shape))
    dynamic = dysurgery.convert(model, plan=plan)
    for batch in (1, 4):
        x = torch.randn(batch, *shape)
        report = dysurgery.cost(dynamic, x)
        assert report.mult_adds == plan.mult_adds[1]
        assert report.params == plan.params[1]
        assert report.input_shape == shape
        with FlopCounterMode(display=False) as counter:
            dynamic(x)
        assert batch * (report.mult_adds.total - report.mult_adds.pooling) == counter.get_total_flops() // 2
