import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import dysurgery
from dysurgery.calibrate import DEFAULT_STD, WAYS, can_calibrate
from dysurgery.nn import DynamicLayer


def converted(name="mobilenetv3_small_050", size=64, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval().double()
    return dysurgery.convert(model, torch.randn(1, 3, size, size, dtype=torch.float64), **options)


def logits(model, images):
    found = {}
    hooks = [
        layer.gate.register_forward_pre_hook(
            lambda gate, args, path=path: found.update({path: gate.fc2(F.relu(gate.fc1(args[0])))})
        )
        for path, layer in model.named_modules()
        if isinstance(layer, DynamicLayer)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet10t", "mobilenetv2_035"])
def test_the_output_stays_and_every_logit_has_mean_0_and_the_asked_deviation(name):
    model = converted(name)
    images = torch.randn(40, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
    done = dysurgery.calibrate(model, images, std=2.0)
    assert done
    with torch.no_grad():
        assert torch.allclose(model(images), before, rtol=0, atol=1e-9 * before.abs().max().item())
    found = logits(model, images)
    for entry in done:
        z = found[entry.path]
        assert z.mean(dim=0).abs().max() < 1e-6
        for k in range(z.shape[1]):
            assert z[:, k].std(correction=0) == pytest.approx(entry.after[k], abs=1e-6)
            assert entry.after[k] == pytest.approx(2.0, abs=1e-6) or entry.after[k] == 0.0
    alive = [max(entry.after) > 0 for entry in done]
    assert sum(alive) > 0.9 * len(alive)


@pytest.mark.parametrize("by", WAYS)
def test_every_way_keeps_the_output_and_gives_the_asked_deviation(by):
    model = converted()
    images = torch.randn(64, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
    done = dysurgery.calibrate(model, images, std=0.7, by=by)
    with torch.no_grad():
        assert torch.allclose(model(images), before, rtol=0, atol=1e-9 * before.abs().max().item())
    found = [entry.after for entry in done if max(entry.after)]
    assert len(found) > 0.9 * len(done)
    assert all(std == pytest.approx(0.7, abs=1e-6) or std == 0 for entry in found for std in entry)


def test_decorrelated_logits_are_as_little_correlated_as_can_be():
    model = converted()
    images = torch.randn(64, 3, 64, 64, dtype=torch.float64)
    done = dysurgery.calibrate(model, images, by="decorrelated")
    found = logits(model, images)
    right = [torch.corrcoef(found[e.path].T)[~torch.eye(4, dtype=torch.bool)] for e in done if min(e.after) > 0]
    assert sum(torch.allclose(r, torch.full_like(r, -1 / 3), atol=1e-4) for r in right) > 0.8 * len(right)


def test_clusters_of_images_get_different_attention():
    model = converted()
    groups = torch.randn(4, 3, 1, 1, dtype=torch.float64).repeat_interleave(16, 0)
    images = 3 * groups + 0.1 * torch.randn(64, 3, 64, 64, dtype=torch.float64)
    done = dysurgery.calibrate(model, images, by="clusters")
    z = logits(model, images)[done[0].path].reshape(4, 16, 4)
    assert len(set(z.mean(dim=1).argmax(dim=1).tolist())) > 1
    assert z.mean(dim=1).std() > 3 * z.std(dim=1).mean()


def test_a_fresh_attention_hardly_varies_and_a_calibrated_one_does():
    model = converted()
    images = torch.randn(64, 3, 64, 64, dtype=torch.float64)
    done = dysurgery.calibrate(model, images)
    assert max(max(entry.before) for entry in done) < 0.3
    assert min(max(entry.after) for entry in done if max(entry.after)) > 0.9 * DEFAULT_STD


def test_batches_say_the_same_as_one_tensor():
    images = torch.randn(24, 3, 64, 64, dtype=torch.float64)
    whole, parts = converted(), converted()
    dysurgery.calibrate(whole, images)
    dysurgery.calibrate(parts, images.split(10))
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-9)


def test_modes_buffers_and_the_random_state_stay():
    model = converted().train()
    model.conv_stem.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    dysurgery.calibrate(model, torch.randn(8, 3, 64, 64, dtype=torch.float64, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_a_pooled_input_that_does_not_vary_leaves_the_attention_alone():
    model = dysurgery.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8), layers="all")
    before = [p.clone() for p in model.parameters()]
    (done,) = dysurgery.calibrate(model, torch.ones(6, 3, 8, 8))
    assert max(done.after) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "words"), [({"start": "zero-sum"}, "kernels of .* differ"), ({"gate": "sigmoid"}, "do not sum to 1")]
)
def test_what_would_change_the_function_is_refused(options, words):
    model = dysurgery.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8), layers="all", **options)
    assert not can_calibrate(model)
    with pytest.raises(dysurgery.UsageError, match=words):
        dysurgery.calibrate(model, torch.randn(6, 3, 8, 8))


def test_mistakes_are_named():
    static, model = nn.Conv2d(3, 4, 3), converted()
    with pytest.raises(dysurgery.UsageError, match="no dynamic layer"):
        dysurgery.calibrate(static, torch.randn(2, 3, 8, 8))
    with pytest.raises(dysurgery.UsageError, match="no images"):
        dysurgery.calibrate(model, [])
    with pytest.raises(dysurgery.UsageError, match=r"0\.\.100"):
        dysurgery.calibrate(model, torch.randn(2, 3, 8, 8), std=-1)
    with pytest.raises(dysurgery.DysurgeryError, match="not finite"):
        dysurgery.calibrate(model, torch.full((2, 3, 64, 64), torch.nan, dtype=torch.float64))
