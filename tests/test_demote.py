import copy
import sys

import pytest
import timm
import torch
from tiny import net
from torch import nn

import dysurgery
from dysurgery.demote import attention_on, variation
from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.nn import DynamicLayer

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(12) % 3


def dynamic(**options):
    """A network of three dynamic layers whose kernels and attentions are all different."""
    torch.manual_seed(1)
    model = dysurgery.convert(net(), IMAGES[:1], layers="all", linear=True, **options).eval()
    for layer in model.modules():
        if isinstance(layer, DynamicLayer):
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.3)
    return model


def layers(model):
    return [path for path, module in model.named_modules() if isinstance(module, DynamicLayer)]


def constant(layer):
    """Let the attention of ``layer`` give the same weights for every image."""
    layer.gate.silence()
    nn.init.normal_(layer.gate.fc2.bias)


def test_frozen_layers_are_of_torchs_own_classes_and_have_the_mean_kernel():
    model = dynamic()
    frozen = dysurgery.freeze(model, IMAGES)
    assert layers(model) == ["conv1", "conv2", "fc"]
    assert [type(frozen.get_submodule(path)) for path in layers(model)] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    pi = model.conv1.gate(IMAGES.mean((2, 3))).mean(dim=0)
    torch.testing.assert_close(frozen.conv1.weight.flatten(), pi @ model.conv1.bank, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen.conv1.bias, pi @ model.conv1.bias_bank, rtol=1e-4, atol=1e-5)
    assert "k" not in vars(frozen.conv1)
    assert dysurgery.cost(frozen, IMAGES).params == dysurgery.cost(net(), IMAGES).params


def test_a_constant_attention_freezes_exactly_and_any_way_of_saying_it():
    model = dynamic()
    for path in layers(model):
        constant(model.get_submodule(path))
    expected = model(IMAGES)
    pi = {path: found[0].clone() for path, found in attention_on(model, [IMAGES]).items()}
    for attention in (IMAGES, [IMAGES[:5], IMAGES[5:]], [(IMAGES, CLASSES)], pi):
        torch.testing.assert_close(dysurgery.freeze(model, attention)(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dysurgery.freeze(model)(IMAGES), expected, rtol=1e-3, atol=1e-3)
    assert dysurgery.freeze(model, pi, in_place=True) is model
    assert not layers(model)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_equal_kernels_need_no_attention():
    model = dysurgery.convert(net(), IMAGES, layers="all")
    torch.testing.assert_close(dysurgery.freeze(model)(IMAGES), model(IMAGES))


def test_only_the_named_layers_are_frozen_with_their_hooks_and_attributes():
    model = dynamic()
    model.conv2.tag, calls = "mine", []
    model.conv2.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    frozen = dysurgery.freeze(model, layers=["conv2"])
    assert layers(frozen) == ["conv1", "fc"]
    frozen(IMAGES)
    assert calls == ["Conv2d"]
    assert frozen.conv2.tag == "mine"


def test_a_real_network_is_frozen_saved_loaded_and_converted_again(tmp_path):
    x = torch.randn(2, 3, 64, 64)
    model = dysurgery.convert(timm.create_model("test_resnet", num_classes=4).eval(), x, start="zero-sum")
    frozen = dysurgery.freeze(model, x)
    again = dysurgery.convert(dysurgery.load(dysurgery.save(frozen, tmp_path / "frozen")), x, k=2)
    torch.testing.assert_close(again(x), frozen(x), rtol=1e-3, atol=1e-4)
    loaded = dysurgery.load(dysurgery.save(again, tmp_path / "again"))
    for number in range(2):  # what was static for a while is known to be so for good
        torch.testing.assert_close(loaded(x), again(x), rtol=0, atol=0)
        loaded = dysurgery.load(dysurgery.save(loaded, tmp_path / str(number)))


def test_standardised_layers_come_back_with_the_plain_class(tmp_path):
    x = torch.randn(2, 3, 64, 64)
    static = nn.Sequential(timm.layers.StdConv2d(3, 4, 3), timm.layers.ScaledStdConv2dSame(4, 6, 3, stride=2)).eval()
    frozen = dysurgery.freeze(dysurgery.convert(static, x, layers="all"))
    assert [type(layer) for layer in frozen] == [nn.Conv2d, timm.layers.Conv2dSame]
    torch.testing.assert_close(frozen(x), static(x), rtol=1e-4, atol=1e-5)
    again = dysurgery.convert(frozen, x, layers="all")
    for number, network in enumerate((frozen, again)):
        folder = dysurgery.save(network, tmp_path / str(number))
        loaded = dysurgery.load(folder, model=copy.deepcopy(static))
        torch.testing.assert_close(loaded(x), network(x), rtol=0, atol=0)


def test_mistakes_are_named():
    model = dynamic()
    with pytest.raises(UsageError, match="no dynamic layer: convert it first"):
        dysurgery.freeze(net())
    with pytest.raises(UsageError, match=r"no dynamic layer 'conv3' \(did you mean 'conv"):
        dysurgery.freeze(model, layers="conv3")
    with pytest.raises(UsageError, match="no dynamic layer 'drop'"):
        dysurgery.freeze(model, {"drop": torch.ones(4)})
    with pytest.raises(UsageError, match=r"4 kernels .* \(3,\)"):
        dysurgery.freeze(model, {"conv1": torch.ones(3)})
    with pytest.raises(UsageError, match="no images"):
        dysurgery.freeze(model, [])
    with pytest.raises(UsageError, match="a batch is images or a pair"):
        dysurgery.freeze(model, ["image.png"])
    assert layers(model) == ["conv1", "conv2", "fc"]


def test_the_variation_is_that_of_the_mixed_kernel():
    model = dynamic()
    pi = attention_on(model, [IMAGES])["conv1"]
    layer = model.conv1.double()
    mixed = pi @ torch.cat([layer.bank, layer.bias_bank], dim=1)
    expected = (mixed - mixed.mean(0)).square().sum(1).mean().sqrt() / mixed.mean(0).norm()
    assert variation(layer, pi) == pytest.approx(expected.item(), rel=1e-9)
    layer.bank.data[:] = layer.bank.data[0]
    layer.bias_bank.data[:] = layer.bias_bank.data[0]
    assert variation(layer, pi) == pytest.approx(0, abs=1e-7)


def picks_by_attention():
    """A network whose first layer has equal kernels, and whose last tells images apart by its attention alone."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    nn.init.dirac_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    model = dysurgery.convert(net, IMAGES, layers="all", linear=True, k=2)
    last = model[3]
    for parameter in (*last.gate.fc1.parameters(), *last.gate.fc2.parameters(), last.bank):
        nn.init.zeros_(parameter)
    last.gate.fc1.weight.data[0, 0] = last.gate.fc2.weight.data[0, 0] = 1
    last.gate.fc2.weight.data *= 100  # the first kernel where the first channel is positive, else both
    last.bias_bank.data = torch.tensor([[9.0, 0.0], [0.0, 10.0]])
    return model


def test_what_hardly_varies_is_demoted_and_what_matters_is_kept():
    model = picks_by_attention()
    images = torch.ones(10, 3, 8, 8)
    images[:4, 0] = -1
    classes = torch.tensor([1] * 4 + [0] * 6)
    done = dysurgery.demote(model, [(images, classes)], tolerance=5)
    assert list(done.variation) == ["0", "3"]
    assert done.variation["0"] < 1e-6 < done.variation["3"]
    assert done.demoted == ("0",)
    assert done.kept == ("3",)
    assert done.one_more == pytest.approx(60)
    assert (done.measure, done.before, done.after, done.images) == ("accuracy", 100, 100, 10)
    assert layers(done.model) == ["3"]
    assert layers(model) == ["0", "3"]
    assert dysurgery.demote(model, [(images, classes)], tolerance=40).after == pytest.approx(60)


def test_it_ends_at_the_first_layer_that_costs_too_much(monkeypatch):
    found = iter([90.0, 89.9, 89.0, 90.0])
    module = sys.modules["dysurgery.demote"]  # the package has the function by that name
    monkeypatch.setattr(module, "score", lambda *args, **options: module.Score("accuracy", next(found), 12))
    done = dysurgery.demote(dynamic(), [(IMAGES, CLASSES)], tolerance=0.1)
    first, *others = done.variation
    assert (done.demoted, done.kept) == ((first,), tuple(others))
    assert (done.before, done.after, done.one_more) == (90.0, 89.9, 89.0)


def test_without_labels_the_predictions_of_the_model_are_what_counts():
    model = dynamic()
    shuffled = torch.utils.data.DataLoader(IMAGES, 5, shuffle=True)
    for data in (IMAGES, IMAGES.split(5), shuffled):
        done = dysurgery.demote(model, data, tolerance=0)
        assert (done.measure, done.before, done.after) == ("agreement", 100, 100)
        assert torch.equal(done.model(IMAGES).argmax(1), model(IMAGES).argmax(1))
    everything = dysurgery.demote(model, IMAGES, tolerance=100)
    assert (len(everything.demoted), everything.kept, everything.one_more) == (3, (), None)


def test_modes_and_the_random_state_stay():
    model = dynamic().train()
    state = torch.get_rng_state()
    done = dysurgery.demote(model, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in done.model.modules())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no images"),
        ((batch for batch in [IMAGES]), "generator"),
        ([(IMAGES, CLASSES + 1)], "has the class 3, and Net knows the 3 classes from 0 to 2"),
        ([(IMAGES, CLASSES[:5])], "12 images cannot have 5 classes"),
    ],
)
def test_data_that_do_not_fit_are_named(data, words):
    with pytest.raises(UsageError, match=words):
        dysurgery.demote(dynamic(), data)


def test_only_a_converted_classifier_and_a_tolerance_in_points():
    with pytest.raises(UsageError, match="no dynamic layer"):
        dysurgery.demote(net(), IMAGES)
    with pytest.raises(UsageError, match=r"0\.\.100, got -1"):
        dysurgery.demote(dynamic(), IMAGES, tolerance=-1)
    maps = dysurgery.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGES, layers="all")
    with pytest.raises(DysurgeryError, match="no classifier"):
        dysurgery.demote(maps, IMAGES)
