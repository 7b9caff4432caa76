import json

import pytest
import timm
import torch
from torch import nn

from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.models import build, rebuild
from dysurgery.source import Source, describe

TINY = "test_resnet"  # the smallest ResNet of timm


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_timm_name_brings_its_tag_its_input_size_and_its_preprocessing():
    built = build("mobilenetv2_050", weights="random")
    assert built.source == Source("timm", "mobilenetv2_050.lamb_in1k", {})
    assert (built.label, built.input_size) == ("mobilenetv2_050", (3, 224, 224))
    cfg = timm.get_pretrained_cfg("mobilenetv2_050")
    assert built.preprocessing["mean"] == list(cfg.mean)
    assert built.preprocessing["interpolation"] == cfg.interpolation
    assert built.preprocessing["crop_pct"] == cfg.crop_pct
    assert not built.model.training


def test_a_tag_chooses_its_own_classes_and_input_size():
    assert build("resnet10t.c3_in1k", weights="random").input_size == (3, 176, 176)
    built = build("test_resnet.r160_in1k", weights="random", model_args={"num_classes": 3})
    assert built.input_size == (3, 160, 160)
    assert built.model.num_classes == 3


def test_a_torchvision_name_brings_the_preprocessing_of_its_weights():
    built = build("torchvision:inception_v3", weights="random", model_args={"init_weights": False})
    assert (built.label, built.input_size) == ("inception_v3", (3, 299, 299))
    assert built.preprocessing["interpolation"] == "bilinear"
    assert built.preprocessing["crop_pct"] == pytest.approx(299 / 342)
    assert built.preprocessing["mean"] == [0.485, 0.456, 0.406]


def test_a_deprecated_name_of_timm_becomes_the_current_one(recwarn):
    assert build("tv_resnet50", weights="random").source.name == "resnet50.tv_in1k"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet81", "did you mean 'resnet18'"),
        ("resnet18.a9_in1k", "did you mean 'a3_in1k'.*it has a1_in1k"),
        ("mobilenet_v2", "did you mean 'torchvision:mobilenet_v2'"),
        ("shufflenetv2_x1_0", "did you mean 'torchvision:shufflenet_v2_x1_0'"),
        ("torchvision:resnet26", "did you mean timm's 'resnet26'"),
        ("torchvision:mobilenetv2", "did you mean 'mobilenet_v2'"),
        ("xyzzy", "torchvision:NAME, FILE.py:FACTORY"),
        ("user/repository", "FILE.py:FACTORY"),
        ("nowhere.py:tiny", "no file .*nowhere.py"),
        ("nowhere.py", "nowhere.py:NAME"),
    ],
)
def test_an_unknown_name_is_answered_with_what_is_near(spec, words):
    with pytest.raises(UsageError, match=words):
        build(spec, weights="random")


def test_a_weight_file_given_as_a_model_is_recognised(tmp_path):
    torch.save({}, tmp_path / "net.pth")
    with pytest.raises(UsageError, match="--weights"):
        build(str(tmp_path / "net.pth"))


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "r3d_18", "raft_small"])
def test_a_model_that_does_not_take_one_image_is_refused(name):
    with pytest.raises(DysurgeryError, match=r"does not take one image.*dysurgery.convert"):
        build(f"torchvision:{name}", weights="random")


@pytest.mark.parametrize(
    ("spec", "args", "words"),
    [
        (
            "resnet18",
            {"num_clases": 3},
            r"no argument 'num_clases' \(did you mean 'num_classes'.*it takes block, layers",
        ),
        ("torchvision:resnet18", {"num_clases": 3}, r"no argument 'num_clases' \(did you mean 'num_classes'"),
        ("resnet18", {"pretrained": True}, "say with --weights"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "say with --weights"),
        ("resnet18", {"act_layer": nn.ReLU}, "act_layer=.*no plain value"),
    ],
)
def test_an_argument_that_the_factory_does_not_take_is_named(spec, args, words):
    with pytest.raises(UsageError, match=words):
        build(spec, weights="random", model_args=args)


def test_a_value_that_the_factory_chokes_on_is_one_sentence():
    with pytest.raises(DysurgeryError, match=r"test_resnet.*num_classes='many'.*TypeError") as caught:
        build(TINY, weights="random", model_args={"num_classes": "many"})
    assert "\n" not in str(caught.value)


def test_arguments_are_recorded_and_used_again():
    built = build("mobilenetv2_050", weights="random", model_args={"pad_type": "same", "num_classes": 3})
    assert built.source.args == {"pad_type": "same", "num_classes": 3}
    again = rebuild(Source.from_json(json.loads(json.dumps(built.source.to_json()))))
    assert type(again.conv_stem).__name__ == "Conv2dSame"
    assert again.state_dict().keys() == built.model.state_dict().keys()


def test_another_number_of_channels_reaches_the_model_and_its_preprocessing():
    built = build(TINY, weights="random", input_size=(1, 64, 48))
    assert built.source.args == {"in_chans": 1}
    assert built.input_size == (1, 64, 48)
    assert built.preprocessing["input_size"] == [1, 64, 48]
    assert len(built.preprocessing["mean"]) == len(built.preprocessing["std"]) == 1
    built.model(torch.zeros(1, 1, 64, 48))
    assert build(TINY, weights="random", model_args={"in_chans": 5}).input_size == (5, 160, 160)
    with pytest.raises(UsageError, match="in_chans=1 contradicts"):
        build(TINY, weights="random", model_args={"in_chans": 1}, input_size=(3, 64, 64))


def test_a_model_of_fixed_size_is_built_for_the_size_asked_for():
    built = build("test_vit", weights="random", input_size=(3, 96, 64))
    built.model(torch.zeros(1, 3, 96, 64))
    assert build("test_vit", weights="random", model_args={"img_size": 96}).input_size == (3, 96, 96)


@pytest.mark.parametrize("size", [(3, 32), (3, 0, 32)])
def test_a_senseless_input_size_is_refused(size):
    with pytest.raises(UsageError, match=r"\(C, H, W\)"):
        build(TINY, weights="random", input_size=size)


def test_random_weights_follow_the_seed_and_leave_the_random_state_alone():
    torch.manual_seed(11)
    state = torch.get_rng_state()
    a, b, c = (build(TINY, weights="random", seed=seed).model for seed in (1, 1, 2))
    rebuild(Source("timm", TINY))
    describe(a)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_tensors(a, b)
    assert not same_tensors(a, c)
