"""The embedded example: scikit-learn's 1 797 handwritten digits, 8x8, and a narrow network for them.

Real images, installed with the package, nothing downloaded.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

INPUT_SIZE = (1, 8, 8)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1 197 training and 600 validation images (1, 8, 8) in -1..1 with their classes, always the same split."""
    # Imported here: it takes a second, which every other command would wait for.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, classes = load_digits(return_X_y=True)
    split = train_test_split(images, classes, test_size=600, random_state=0, stratify=classes)
    train_x, val_x, train_y, val_y = (torch.from_numpy(part) for part in split)

    def dataset(x: Tensor, y: Tensor) -> TensorDataset:
        return TensorDataset(x.reshape(-1, *INPUT_SIZE).float() / 8.0 - 1.0, y.long())

    return dataset(train_x, train_y), dataset(val_x, val_y)


class NarrowNet(nn.Sequential):
    """Four convolutions of a few channels, as narrow as a network for digits can well be: (B, 1, 8, 8) to (B, 10)."""

    def __init__(self, width: int = 4) -> None:
        def block(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]

        super().__init__(
            *block(1, width),
            *block(width, width),
            *block(width, 2 * width, stride=2),
            *block(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )
