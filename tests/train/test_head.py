import pytest
import timm
import torch
import torchvision
from torch import nn

import dysurgery
from dysurgery import DysurgeryError
from dysurgery.train.head import outputs_of, replace_head


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (lambda: timm.create_model("mobilenetv3_small_050"), "reset_classifier"),
        (lambda: torchvision.models.mobilenet_v2(), "classifier.1"),
        (lambda: timm.create_model("cifar_resnet20", width=4), "linear"),
    ],
)
def test_a_network_gets_a_fresh_head(make, how):
    model, x = make(), torch.randn(2, 3, 64, 64)
    others = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert replace_head(model, 5, x, 0) == how
    assert model.eval()(x).shape == (2, 5)
    changed = [n for n, t in model.state_dict().items() if t.shape != others[n].shape or not torch.equal(t, others[n])]
    assert len({name.rpartition(".")[0] for name in changed}) == 1


def test_the_seed_decides_the_new_weights_and_the_random_state_stays():
    x, state = torch.randn(2, 3, 64, 64), torch.get_rng_state()
    heads = []
    for seed in (0, 0, 1):
        model = timm.create_model("cifar_resnet20", width=4)
        torch.set_rng_state(state)
        replace_head(model, 5, x, seed)
        assert torch.equal(torch.get_rng_state(), state)
        heads.append(model.linear.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_attention_is_never_taken_for_the_head():
    static = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 7, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    dynamic = dysurgery.convert(static, torch.randn(1, 3, 8, 8), layers="all")
    with pytest.raises(DysurgeryError, match="no Linear"):
        replace_head(dynamic, 5, torch.randn(1, 3, 8, 8), 0)


def test_what_is_no_classifier_is_refused():
    with pytest.raises(DysurgeryError, match="no classifier"):
        replace_head(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 6)), 5, torch.randn(1, 3, 8, 8), 0)


def test_a_network_for_other_images_says_which_it_was_given():
    with pytest.raises(DysurgeryError, match=r"Conv2d does not take 3x224x224 images .*1 channels.*--input-size"):
        outputs_of(nn.Conv2d(1, 8, 3), torch.zeros(1, 3, 224, 224))
