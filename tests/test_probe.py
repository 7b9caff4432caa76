import math

import numpy as np
import pytest
import timm
import torch
from tiny import image_data, net
from torch import nn

import dysurgery
from dysurgery import DysurgeryError, UsageError
from dysurgery.nn import DynamicConv2d
from dysurgery.probe import AVERAGED_ELSEWHERE, INTERVENTIONS, intervene, kernel_distance
from dysurgery.train import finetune, load_recipe


def tiny(**options):
    return dysurgery.convert(net(), torch.randn(1, 3, 8, 8), layers="all", **options).eval()


def varied(classes=3, **options):
    """A small dynamic network whose kernels differ and whose attention varies."""
    model = dysurgery.convert(net(classes=classes), torch.randn(1, 3, 8, 8), layers="all", **options)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, dysurgery.nn.DynamicLayer):
                layer.bank += layer.bank.std() * torch.randn_like(layer.bank)
                layer.gate.fc2.weight *= 20
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    recipe = load_recipe("digits", {"pretrain.epochs": 3, "finetune.epochs": 4, "temperature.warmup": 1})
    return finetune(recipe=recipe, control=False)


@pytest.fixture(scope="module")
def report(trained):
    return dysurgery.probe(trained.model, "digits", layer_images=200)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_an_intervention_keeps_the_total_weight_of_each_image(name):
    pi = torch.rand(16, 5, dtype=torch.float64)
    changed = INTERVENTIONS[name](pi, torch.Generator())
    assert changed.shape == pi.shape
    assert not torch.equal(changed, pi)
    totals = [weights.sum(dim=1).sort().values for weights in (changed, pi)]
    torch.testing.assert_close(*totals)
    if name != "shuffled_across":
        torch.testing.assert_close(changed.sum(dim=1), pi.sum(dim=1))


def test_what_each_intervention_does_to_pi():
    pi, generator = torch.softmax(torch.randn(32, 4), dim=1), torch.Generator()
    assert torch.allclose(INTERVENTIONS["averaged"](pi, generator), torch.full((32, 4), 0.25))
    alone = INTERVENTIONS["argmax"](pi, generator)
    assert torch.equal(alone.argmax(dim=1), pi.argmax(dim=1))
    assert torch.equal((alone > 0).sum(dim=1), torch.ones(32).long())
    within = INTERVENTIONS["shuffled_within"](pi, generator)
    assert torch.equal(within.sort(dim=1).values, pi.sort(dim=1).values)
    across = INTERVENTIONS["shuffled_across"](pi, generator)
    lender = [int((row == pi).all(dim=1).nonzero()) for row in across]
    assert sorted(lender) == list(range(32))
    assert all(image != other for image, other in enumerate(lender))  # nobody keeps its own


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_resnet"])
@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_right_after_conversion_no_intervention_changes_anything(name, intervention):
    static = timm.create_model(name).double().eval()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    dynamic = dysurgery.convert(static, x[:1])
    with intervene(dynamic, intervention), torch.no_grad():
        torch.testing.assert_close(dynamic(x), static(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_kernels_that_sum_to_zero_give_the_static_network_when_averaged(gate):
    static = net().double().eval()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    dynamic = dysurgery.convert(static, x[:1], layers="all", gate=gate, start="zero-sum")
    with intervene(dynamic, "averaged"), torch.no_grad():
        torch.testing.assert_close(dynamic(x), static(x), rtol=1e-10, atol=1e-10)
    with intervene(dynamic, "argmax"), torch.no_grad():
        assert not torch.allclose(dynamic(x), static(x), rtol=1e-3)


def test_a_trained_network_depends_on_whose_attention_it_has(trained):
    images = torch.stack([image for image, _ in _digits(64)])
    with torch.no_grad():
        learned = trained.model(images)
        with intervene(trained.model, "shuffled_across"):
            shuffled = trained.model(images)
        assert torch.equal(trained.model(images), learned)  # the hooks are gone
    assert (shuffled - learned).abs().max() > 0.1


def _digits(count):
    from dysurgery.models import preprocessing_of
    from dysurgery.train import open_data
    from dysurgery.train.data import val_loader

    _, preprocessing = preprocessing_of(timm.create_model("digits_net"))
    data = open_data("digits", load_recipe("digits"))
    (images, classes), *_ = val_loader(
        data.val, {**preprocessing, "input_size": [1, 8, 8]}, count, 0, torch.device("cpu")
    )
    return list(zip(images, classes, strict=True))


def test_one_other_image_lends_its_attention_to_all_layers():
    model, lent = varied(), {}
    x = torch.randn(6, 3, 8, 8)

    def look(path, gate, args, pi):
        lent[path] = [int((row == gate.forward(args[0])).all(dim=1).nonzero()) for row in pi]

    with intervene(model, "shuffled_across", seed=3), torch.no_grad():
        for path in ("conv1", "conv2"):
            model.get_submodule(path).gate.register_forward_hook(lambda *args, path=path: look(path, *args))
        model(x)
    assert lent["conv1"] == lent["conv2"]


def test_the_accuracy_is_that_of_the_run_and_every_place_is_looked_at(trained, report):
    assert report.accuracy == pytest.approx(trained.mean("dynamic"))
    assert (report.images, report.layer_images, report.measure) == (600, 200, "accuracy")
    assert [(layer.path, layer.resolution) for layer in report.layers] == [("3", "8x8"), ("6", "8x8"), ("9", "4x4")]
    assert report.places == (
        ("all", ""),
        ("resolution", "8x8"),
        ("resolution", "4x4"),
        ("layer", "3"),
        ("layer", "6"),
        ("layer", "9"),
    )
    for scope, name in report.places:
        for intervention in INTERVENTIONS:
            effect = report.effect(intervention, scope, name)
            learned = report.accuracy if scope == "all" else report.layer_accuracy
            assert effect.change == pytest.approx(effect.accuracy - learned)
            assert effect.images == (600 if scope == "all" else 200)
            assert 0 <= effect.agreement <= 100
    # One layer alone sees 4x4, so that these are the same thing.
    for intervention in ("averaged", "argmax"):
        alone, group = report.effect(intervention, "layer", "9"), report.effect(intervention, "resolution", "4x4")
        assert (alone.accuracy, alone.agreement) == (group.accuracy, group.agreement)
    elsewhere = report.effect(AVERAGED_ELSEWHERE, "resolution", "4x4")
    assert elsewhere.accuracy == report.effect("averaged", "resolution", "8x8").accuracy
    assert report.layer().spread == max(layer.spread for layer in report.layers)
    assert not report.notes


def test_figures_are_plain_values_and_the_same_every_time(trained, report):
    import json

    again = dysurgery.probe(trained.model, "digits", layer_images=200)
    assert again == report
    assert json.loads(json.dumps(report.to_json()))["layers"][0]["path"] == "3"
    other = dysurgery.probe(trained.model, "digits", layer_images=0, seed=1)
    assert other.effect("averaged") == report.effect("averaged")
    assert other.effect("shuffled_across") != report.effect("shuffled_across")
    assert other.places == (("all", ""),)


def test_the_statistics_are_those_of_pi():
    model = varied(k=3)
    images, classes = torch.randn(40, 3, 8, 8), torch.arange(40) % 3
    report = dysurgery.probe(model, [(images[:30], classes[:30]), (images[30:], classes[30:])])
    layer = report.layers[0]
    pi = model.conv1.gate(images.mean((2, 3))).double()
    torch.testing.assert_close(report.pi["conv1"].double(), pi, rtol=1e-5, atol=1e-6)
    assert layer.entropy == pytest.approx(-(pi * pi.log()).sum(1).mean().item() / math.log(3), abs=1e-6)
    assert layer.spread == pytest.approx(pi.std(0, correction=0).mean().item(), abs=1e-6)
    means = torch.stack([pi[classes == number].mean(0) for number in range(3)])
    assert layer.class_spread == pytest.approx(means.std(0, correction=0).mean().item(), abs=1e-6)
    assert layer.mean == pytest.approx(pi.mean(0).tolist(), abs=1e-6)
    assert layer.std == pytest.approx(pi.std(0, correction=0).tolist(), abs=1e-6)
    assert layer.share == pytest.approx([(pi.argmax(1) == k).double().mean().item() for k in range(3)])
    w = model.conv1.bank.double()
    pairs = [(w[0] - w[1]).norm(), (w[0] - w[2]).norm(), (w[1] - w[2]).norm()]
    assert layer.distance == pytest.approx((sum(pairs) / 3 / w.mean(0).norm()).item())


def test_standardised_kernels_are_compared_as_they_are_mixed():
    static = nn.Sequential(timm.layers.StdConv2d(3, 4, 3, padding=1))
    (layer,) = dysurgery.convert(static, torch.randn(1, 3, 8, 8), layers="all", k=2)
    assert kernel_distance(layer) == 0
    with torch.no_grad():
        layer.bank[1] *= 3  # a scale is standardised away
    assert kernel_distance(layer) == pytest.approx(0, abs=1e-3)
    with torch.no_grad():
        layer.bank[1] = torch.randn_like(layer.bank[1])
    assert kernel_distance(layer) > 0.5


def test_a_fresh_network_loses_nothing_and_the_notes_say_why():
    report = dysurgery.probe(tiny(), torch.randn(12, 3, 8, 8))
    assert all(effect.agreement == 100 for effect in report.effects)
    assert "kernels of 2 of 2 layers are all equal" in report.notes[0]
    silent = dysurgery.probe(tiny(start="zero-sum"), torch.randn(12, 3, 8, 8))
    assert "attention of 2 of 2 layers hardly varies" in silent.notes[0]


def test_without_labels_the_agreement_is_reported(trained):
    images, classes = (torch.stack(list(part)) for part in zip(*_digits(100), strict=True))
    unlabelled = dysurgery.probe(trained.model, images)
    assert (unlabelled.measure, unlabelled.learned, unlabelled.accuracy) == ("agreement", 100, None)
    assert unlabelled.layers[0].class_spread is None
    assert unlabelled.difference("averaged") == unlabelled.effect("averaged").agreement - 100
    labelled = dysurgery.probe(trained.model, (images, classes))
    assert labelled.accuracy is not None
    assert labelled.effect("averaged").agreement == unlabelled.effect("averaged").agreement
    assert dysurgery.probe(trained.model, (images, classes), labels=False) == unlabelled


def test_what_the_data_may_be():
    model = varied()
    images, classes = torch.randn(20, 3, 8, 8), torch.arange(20) % 3
    whole = dysurgery.probe(model, images)
    assert whole.images == 20
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, classes), 8)
    assert dysurgery.probe(model, loader).accuracy is not None
    some = dysurgery.probe(model, (batch for batch, _ in loader), images=11)
    assert (some.images, len(some.pi["conv1"])) == (11, 11)
    assert dysurgery.probe(model, images, images=7).images == 7
    named = dysurgery.probe(model, image_data(), layer_images=5)
    assert (named.images, named.layer_images, named.classes) == (20, 5, ("red", "green", "blue"))
    assert named.thumbnails.shape == (5, 3, 8, 8)


def test_thumbnails_are_the_images_before_normalisation():
    model, data = varied(), image_data()
    model.default_cfg = {"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.2, 0.2), "crop_pct": 1.0}
    shown = dysurgery.probe(model, data).thumbnails.float().mean((2, 3))
    data_means = torch.stack(
        [torch.tensor(np.asarray(image.resize((8, 8))).reshape(-1, 3)).float().mean(0) for image in data.val.images]
    )
    assert shown.mean(0).tolist() == pytest.approx(data_means.mean(0).tolist(), abs=4)


def test_the_model_and_the_random_state_stay_as_they_were():
    model = varied().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    dysurgery.probe(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_linear_layers_and_layers_that_run_twice_are_looked_at_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = DynamicConv2d(3, 3, 3, padding=1)
            self.unused = DynamicConv2d(3, 3, 3)
            self.head = dysurgery.DynamicLinear(3, 5, k=2)

        def forward(self, x):
            return self.head(self.conv(self.conv(x)).mean((2, 3)))

    report = dysurgery.probe(Twice(), torch.randn(6, 3, 8, 8))
    assert [(layer.path, layer.resolution, layer.k) for layer in report.layers] == [
        ("conv", "8x8", 4),
        ("head", "-", 2),
    ]
    assert report.pi["conv"].shape == (6, 4)
    assert report.notes[-1] == "not reached by the images: unused"


def test_progress_counts_every_run_and_ends_at_its_total():
    seen = []
    dysurgery.probe(
        varied(), torch.randn(20, 3, 8, 8), batch_size=8, layer_images=10, progress=lambda *of: seen.append(of)
    )
    done, total = seen[-1]
    assert done == total == 20 * 5 + 10 * 8  # one resolution, two layers
    assert [now for now, _ in seen] == sorted(now for now, _ in seen)
    dysurgery.probe(varied(), [torch.randn(4, 3, 8, 8)], progress=lambda *of: seen.append(of))
    assert seen[-1][1] is None


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (torch.randn(0, 3, 8, 8), UsageError, "no images"),
        ([], UsageError, "no images"),
        ([torch.randn(1, 3, 8, 8)] * 3, UsageError, "batches of two"),
        (torch.randn(4, 1, 8, 8), DysurgeryError, "does not run on an example of shape"),
        ((torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])), UsageError, "4 classes and Net has 3 outputs"),
        ((torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, -1])), UsageError, "no class"),
        ((torch.randn(4, 3, 8, 8), torch.tensor([0, 1])), UsageError, "4 images cannot have 2 classes"),
        ([torch.randn(4, 3, 8, 8), "x"], UsageError, "a loader gives images"),
        (7, UsageError, "expected a name, a tensor"),
        ("digit", UsageError, "did you mean 'digits'"),
        ("digits", UsageError, "10 classes and Net has 3 outputs"),
    ],
)
def test_mistakes_are_answered_by_one_sentence(data, error, words):
    with pytest.raises(error, match=words):
        dysurgery.probe(varied(), data)


def test_a_static_model_an_unknown_layer_and_an_unknown_intervention_are_named(report):
    with pytest.raises(UsageError, match="no dynamic layer with more than one kernel: convert it first"):
        dysurgery.probe(net(), torch.randn(4, 3, 8, 8))
    with pytest.raises(UsageError, match=r"no dynamic layer '33' \(did you mean '3'"):
        report.layer("33")
    model = varied()
    with (
        pytest.raises(UsageError, match=r"did you mean 'conv[12]' or 'conv[12]'"),
        intervene(model, "argmax", ["conv"]),
    ):
        pass
    with pytest.raises(UsageError, match="did you mean 'averaged'"), intervene(model, "average"):
        pass
    assert not model.conv1.gate._forward_hooks
    with pytest.raises(UsageError, match="images is at least 1"):
        dysurgery.probe(model, torch.randn(4, 3, 8, 8), images=0)
    with pytest.raises(DysurgeryError, match=r"no classifier: expected logits \(B, classes\), got \(4, 8, 6, 6\)"):
        dysurgery.probe(nn.Sequential(DynamicConv2d(3, 8, 3)), torch.randn(4, 3, 8, 8))
