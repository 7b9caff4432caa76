import math

import pytest
import torch
from torch import nn

import dysurgery
from dysurgery.train.attention import attention_statistics


def model(k=4, **options):
    torch.manual_seed(0)
    return dysurgery.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8), layers="all", k=k, **options)


def test_a_uniform_attention_has_entropy_1_and_no_spread():
    uniform = model(start="zero-sum")
    (entry,) = attention_statistics(uniform, [torch.randn(9, 3, 8, 8)])
    assert entry.entropy == pytest.approx(1.0)
    assert entry.spread == pytest.approx(0.0, abs=1e-7)


def test_one_kernel_alone_has_entropy_0():
    one = model()
    with torch.no_grad():
        one[0].gate.fc2.weight.zero_()
        one[0].gate.fc2.bias.copy_(torch.tensor([200.0, 0, 0, 0]))
    (entry,) = attention_statistics(one, [torch.randn(9, 3, 8, 8)])
    assert entry.entropy == pytest.approx(0.0, abs=1e-9)


def test_batches_together_say_what_their_images_say():
    images = torch.randn(20, 3, 8, 8)
    dynamic = model()
    dysurgery.calibrate(dynamic, images, std=0.5)
    (whole,), (parts,) = attention_statistics(dynamic, [images]), attention_statistics(dynamic, images.split(7))
    assert whole.spread == pytest.approx(parts.spread)
    assert whole.entropy == pytest.approx(parts.entropy)
    pi = dynamic[0].gate(images.mean((2, 3))).double()
    assert whole.entropy == pytest.approx(-(pi * pi.log()).sum(1).mean().item() / math.log(4))
    assert whole.spread > 0.1
