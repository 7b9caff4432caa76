import json

import pytest
import timm
import torch
import torchvision
from torch import nn

import dysurgery
from dysurgery.errors import DysurgeryError
from dysurgery.models import build, rebuild
from dysurgery.source import Source, describe

TINY = "test_resnet"  # the smallest ResNet of timm
SQUEEZE = "torchvision:squeezenet1_1"


def test_a_source_of_a_file_is_found_from_another_folder_and_after_a_move(factory_file, tmp_path, monkeypatch):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    factory_file.rename(home / "mynet.py")
    monkeypatch.chdir(home)
    source = build("mynet.py:tiny", model_args={"classes": 2}).source
    monkeypatch.chdir(tmp_path)
    data = json.loads(json.dumps(source.to_json(home / "saved")))
    assert Source.from_json(data, home / "saved") == source
    assert rebuild(source).classifier.out_features == 2
    home.rename(away)
    moved = Source.from_json(data, away / "saved")
    assert moved.name == f"{away / 'mynet.py'}:tiny"
    assert rebuild(moved).classifier.out_features == 2
    with pytest.raises(DysurgeryError, match=r"is gone.*pass the static model"):
        rebuild(Source.from_json(data))


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"kind": "timm"},
        {"kind": "pickle", "name": "x", "args": {}},
        {"kind": "timm", "name": "", "args": {}},
        {"kind": "timm", "name": 3, "args": {}},
        {"kind": "timm", "name": "resnet18", "args": []},
    ],
)
def test_rubbish_is_no_source(data):
    with pytest.raises(DysurgeryError, match="no source of a model"):
        Source.from_json(data)


def test_rebuilding_needs_neither_network_nor_cache(offline):
    for spec in (TINY, SQUEEZE, "torchvision:lraspp_mobilenet_v3_large"):
        built = build(spec, weights="random")
        again = rebuild(built.source)
        assert not again.training
        assert again.state_dict().keys() == built.model.state_dict().keys()
    assert not offline


def test_a_rebuild_of_what_no_longer_exists_is_one_sentence():
    with pytest.raises(DysurgeryError, match="resnet_of_2040"):
        rebuild(Source("timm", "resnet_of_2040"))
    with pytest.raises(DysurgeryError, match="resnet_of_2040"):
        rebuild(Source("torchvision", "resnet_of_2040"))


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("resnet10t", {}, ("resnet10t", {})),
        ("resnet18.a3_in1k", {"num_classes": 5}, ("resnet18.a3_in1k", {"num_classes": 5})),
        ("mobilenetv2_050", {"in_chans": 1}, ("mobilenetv2_050", {"in_chans": 1})),
        ("convnext_atto", {}, ("convnext_atto", {})),
    ],
)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "inferred"])
def test_a_model_of_timm_is_described(name, args, expected, recorded):
    model = timm.create_model(name, **args)
    if not recorded:  # as older versions of timm
        vars(model).pop("_model_args", None)
    assert describe(model) == Source("timm", *expected)


def test_a_new_head_by_timms_own_method_is_described():
    model = timm.create_model(TINY)
    model.reset_classifier(5)
    assert describe(model).args == {"num_classes": 5}


def test_a_converted_model_is_described_as_what_it_was():
    model = timm.create_model("mobilenetv2_050", num_classes=3).eval()
    source = describe(model)
    assert source is not None
    assert describe(dysurgery.convert(model, torch.zeros(1, 3, 32, 32))) == source


def own_head(model):
    model.fc = nn.Linear(model.fc.in_features, 7)


def other_activation(model):
    model.act1 = nn.SiLU()


def own_forward(model):
    model.forward = lambda x: x


def wider_parameter(model):
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize("change", [own_head, other_activation, own_forward, wider_parameter])
def test_a_model_that_was_changed_by_hand_is_not_described(change):
    model = timm.create_model("resnet10t")
    change(model)
    assert describe(model) is None


def test_what_timm_did_not_make_or_cannot_make_again_is_not_described():
    assert describe(nn.Conv2d(3, 3, 3)) is None
    assert describe(torchvision.models.squeezenet1_1()) is None
    assert describe(timm.create_model(TINY, act_layer=nn.SiLU)) is None
    impostor = nn.Conv2d(3, 3, 3)
    impostor.pretrained_cfg = {"architecture": "resnet10t"}
    assert describe(impostor) is None
