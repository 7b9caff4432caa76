"""Two small networks that the recipes need and neither timm nor torchvision has, registered with timm by name.

``timm.create_model("cifar_resnet20", width=4)`` works once this module is imported, so everything that takes a name
takes theirs. They have no pretrained weights to download; ``--weights FILE`` loads one's own.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CifarResNet", "DigitsNet", "cifar_resnet20", "digits_net"]

default_cfgs = generate_default_cfgs(
    {
        "digits_net": {
            "input_size": (1, 8, 8), "num_classes": 10, "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0,
            "interpolation": "bilinear", "first_conv": "0", "classifier": "14",
        },
        "cifar_resnet20": {
            "input_size": (3, 32, 32), "num_classes": 10, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
            "crop_pct": 1.0, "interpolation": "bilinear", "first_conv": "conv1", "classifier": "linear",
        },
    }
)  # fmt: skip


class DigitsNet(nn.Sequential):
    """Four convolutions of a few channels, as narrow as a network for digits can well be: (B, 1, 8, 8) to (B, 10)."""

    def __init__(self, width: int = 4, num_classes: int = 10, in_chans: int = 1) -> None:
        def block(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]

        super().__init__(
            *block(in_chans, width),
            *block(width, width),
            *block(width, 2 * width, stride=2),
            *block(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, num_classes),
        )
        self.num_classes, self.in_chans = num_classes, in_chans


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every second pixel, missing channels zero."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride = stride
        self.pad = ((out - channels) // 2, out - channels - (out - channels) // 2)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if any(self.pad) or self.stride > 1:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pad))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """The residual network for 32x32 images of He et al., CVPR 2016, section 4.2, with option A shortcuts.

    Args:
        blocks: residual blocks in each of the three stages; 6 * blocks + 2 layers.
        width: channels of the first stage; then 2 and 4 times as many.
        num_classes: outputs.
        in_chans: channels of the image.
    """

    def __init__(self, blocks: int = 3, width: int = 16, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()

        def stage(channels: int, out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(_Block(channels, out, stride), *(_Block(out, out, 1) for _ in range(blocks - 1)))

        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.num_classes, self.in_chans = num_classes, in_chans

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


@register_model  # type: ignore[untyped-decorator]
def digits_net(pretrained: bool = False, **kwargs: Any) -> DigitsNet:
    """Build a :class:`DigitsNet`."""
    network: DigitsNet = build_model_with_cfg(DigitsNet, "digits_net", pretrained, **kwargs)
    return network


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build a :class:`CifarResNet` of 20 layers; ``width=4`` makes it a quarter as wide."""
    network: CifarResNet = build_model_with_cfg(CifarResNet, "cifar_resnet20", pretrained, **kwargs)
    return network
