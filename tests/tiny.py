"""A data set and a network small enough for a training run in milliseconds."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from dysurgery.train.data import Data

PREPROCESSING = {
    "input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0,
    "crop_mode": "center",
}  # fmt: skip


class Images(torch.utils.data.Dataset):
    """Small noisy images whose class is in their colour."""

    def __init__(self, count, seed, classes=3):
        rng = np.random.default_rng(seed)
        self.targets = [int(t) for t in rng.integers(classes, size=count)]
        noise = rng.integers(0, 120, size=(count, 10, 10, 3))
        for index, target in enumerate(self.targets):
            noise[index, :, :, target] += 80
        self.images = [Image.fromarray(image.astype(np.uint8)) for image in noise]

    def __getitem__(self, index):
        return self.images[index], self.targets[index]

    def __len__(self):
        return len(self.targets)


class Net(nn.Module):
    """Two convolutions without BatchNorm, dropout and a head."""

    def __init__(self, classes=3, dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(8, classes)
        self.input_size = (3, 8, 8)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(self.drop(x.mean((2, 3))))


def net(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**options)


def image_data(train=48, val=20):
    return Data("colours", Images(train, 0), Images(val, 1), ("red", "green", "blue"))


def write_images(folder, count, seed=0, size=20):
    """Write ``count`` images of noise, brighter in the colour channel ``seed``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        pixels = rng.integers(0, 155, (size, size, 3), dtype=np.uint8)
        pixels[:, :, seed % 3] += 100
        Image.fromarray(pixels).save(folder / f"{index}.png")


def write_pets(folder, train=6, val=4):
    """Write a folder of images of two classes, with ``train`` and ``val`` images of each."""
    for part, count in (("train", train), ("val", val)):
        for seed, name in enumerate(("cat", "dog")):
            write_images(folder / part / name, count, seed + 3 * (part == "val"))
    return folder
