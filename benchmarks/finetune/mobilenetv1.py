"""MobileNetV1 x0.25 as Keras trained it: a timm architecture that timm registers without this width."""

from timm.models.efficientnet import _gen_mobilenet_v1
from torch import nn


def mobilenetv1_025(num_classes: int = 1000) -> nn.Module:
    """Return the network; it takes RGB in -1..1, the weights of Keras applications load strictly."""
    model: nn.Module = _gen_mobilenet_v1("mobilenetv1_100", 0.25, pad_type="same", bn_eps=1e-3, num_classes=num_classes)
    cfg = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.875}
    setattr(model, "pretrained_cfg", cfg)  # noqa: B010 a plain attribute, whatever mypy takes it for
    return model
