import timm
import torch

import dysurgery
from dysurgery.models import build


def test_resnet20_is_that_of_he_et_al():
    model = build("cifar_resnet20", weights="random").model
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 19
    assert sum(p.numel() for p in model.parameters()) == 269722
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_they_are_built_by_name_with_arguments_and_saved_like_any_other(tmp_path):
    narrow = timm.create_model("cifar_resnet20", width=4, num_classes=7)
    assert narrow.conv1.out_channels == 4
    dynamic = dysurgery.convert(narrow, torch.randn(1, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    built = build("cifar_resnet20", weights="random", model_args={"width": 4, "num_classes": 7})
    dysurgery.save(dynamic, tmp_path / "saved", source=built.source)
    assert torch.equal(dysurgery.load(tmp_path / "saved")(x), dynamic.eval()(x))
    assert build("digits_net", weights="random").input_size == (1, 8, 8)
