"""Fixtures for every test: no network, and a folder of one's own."""

import os
import socket

import pytest
import torch
from huggingface_hub import constants

# A test that reached for the hub would be slow online and fail offline.
os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that tests start
constants.HF_HUB_OFFLINE = True  # for this one, which has read the variable already

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes with a thread for every core each would wait for one another.
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)  # the width of the terminal that pytest was started in

torch.manual_seed(0)  # for what the test files draw when they are imported

FACTORY = '''
import torch
from torch import nn


class TinyNet(nn.Module):
    """Four convolutions, a residual, a head: what a person's own network looks like."""

    def __init__(self, width=8, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.pointwise = nn.Conv2d(width, 2 * width, 1)
        self.dense = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.pointwise(x + self.depthwise(x))
        return self.classifier(torch.relu(self.dense(x)).mean((2, 3)))


def tiny(width=8, classes=5):
    torch.manual_seed(0)
    return TinyNet(width, classes)


def broken():
    raise RuntimeError("no disk today")


def no_model():
    return "a string"
'''


@pytest.fixture(autouse=True)
def seeded():
    """Random weights and images are the same whichever tests run: a tolerance holds always or never."""
    torch.manual_seed(0)


@pytest.fixture
def factory_file(tmp_path):
    """A file with the factories ``tiny``, ``broken`` and ``no_model``."""
    path = tmp_path / "mynet.py"
    path.write_text(FACTORY)
    return path


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches, and a hub that may be asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.fixture
def offline(caches, monkeypatch):
    """Empty caches and no network; the list of host names that were looked up."""
    asked = []

    def unknown(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return asked
