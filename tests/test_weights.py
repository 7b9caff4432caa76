import json
import socket
import threading
import time

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from dysurgery import weights as weight_files
from dysurgery.errors import DysurgeryError
from dysurgery.models import WeightsUnavailable, build, rebuild
from dysurgery.source import Source

TINY = "test_resnet"  # the smallest ResNet of timm
SQUEEZE = "torchvision:squeezenet1_1"


def put_on_the_hub_cache(folder, repository, **files):
    """Lay files out as huggingface_hub does; the values are functions that write to a path."""
    home, commit = folder / "hub" / f"models--{repository.replace('/', '--')}", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots" / commit).mkdir(parents=True)
    for name, write in files.items():
        write(home / "snapshots" / commit / name.replace("__", "."))


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("spec", "host", "variable"),
    [(TINY, "huggingface.co", "HF_HUB_CACHE"), (SQUEEZE, "download.pytorch.org", "TORCH_HOME")],
)
def test_offline_the_architecture_comes_with_a_sentence_and_at_once(offline, capfd, spec, host, variable):
    start = time.perf_counter()
    with pytest.raises(WeightsUnavailable, match=f"not in the cache.*{host}.*reached.*{variable}") as caught:
        build(spec)
    assert time.perf_counter() - start < 5
    assert "--weights random" in str(caught.value)
    assert "--weights FILE" in str(caught.value)
    assert sum(p.numel() for p in caught.value.built.model.parameters()) > 1000
    assert len(offline) <= 2
    assert capfd.readouterr() == ("", "")


def test_a_network_that_swallows_requests_does_not_hold_it_up(caches, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(weight_files, "PATIENCE", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: released.wait(10) or [])
    start = time.perf_counter()
    with pytest.raises(WeightsUnavailable, match="no answer within"):
        build(TINY)
    assert time.perf_counter() - start < 5
    released.set()


def test_the_hub_is_not_asked_when_it_is_switched_off(offline, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailable, match="offline mode"):
        build(TINY)
    assert not offline


def test_a_model_without_pretrained_weights_says_so(offline):
    untrained = "vovnet39a"
    assert not timm.get_pretrained_cfg(untrained).has_weights
    with pytest.raises(WeightsUnavailable, match=r"timm \S+ has none; .*--weights random") as caught:
        build(untrained)
    assert caught.value.built.label == untrained
    assert not offline


def test_weights_in_the_hub_cache_are_taken_without_asking(offline, tmp_path):
    expected = timm.create_model(TINY)
    repository = timm.get_pretrained_cfg(TINY).hf_hub_id
    put_on_the_hub_cache(tmp_path, repository, model__safetensors=lambda p: save_file(expected.state_dict(), p))
    built = build(TINY)
    assert same_tensors(built.model, expected)
    assert "file" not in built.model.pretrained_cfg
    assert not offline


def test_another_number_of_classes_gets_a_new_classifier_on_the_pretrained_weights(offline, tmp_path):
    expected = timm.create_model(TINY)
    repository = timm.get_pretrained_cfg(TINY).hf_hub_id
    put_on_the_hub_cache(tmp_path, repository, model__safetensors=lambda p: save_file(expected.state_dict(), p))
    built = build(TINY, model_args={"num_classes": 2})
    head = [name for name in expected.state_dict() if name.startswith("fc.")]
    assert len(head) == 2
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in built.model.state_dict().items() if k not in head)
    assert same_tensors(built.model, build(TINY, model_args={"num_classes": 2}).model)


def test_pickled_weights_in_the_hub_cache_are_found_too(offline, tmp_path):
    expected = timm.create_model(TINY)
    repository = timm.get_pretrained_cfg(TINY).hf_hub_id
    put_on_the_hub_cache(tmp_path, repository, pytorch_model__bin=lambda p: torch.save(expected.state_dict(), p))
    assert same_tensors(build(TINY).model, expected)


def test_a_repository_of_the_hub_is_rebuilt_without_it(offline, tmp_path):
    expected = timm.create_model(TINY, num_classes=6, in_chans=1)
    config = {
        "architecture": TINY,
        "num_classes": 6,
        "model_args": {"in_chans": 1},
        "pretrained_cfg": {"input_size": [1, 48, 48], "mean": [0.4], "std": [0.3], "first_conv": "conv1.0"},
    }
    put_on_the_hub_cache(
        tmp_path,
        "someone/faces",
        config__json=lambda p: p.write_text(json.dumps(config)),
        model__safetensors=lambda p: save_file(expected.state_dict(), p),
    )
    built = build("hf-hub:someone/faces")
    assert same_tensors(built.model, expected)
    assert (built.label, built.input_size) == (TINY, (1, 48, 48))
    assert built.preprocessing["mean"] == [0.4]
    assert not offline
    again = rebuild(Source.from_json(json.loads(json.dumps(built.source.to_json()))))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    assert again.pretrained_cfg["mean"] == [0.4]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["Bert"]}, "no timm model"),
        ({"architecture": "resnet_of_2040", "pretrained_cfg": {}}, "resnet_of_2040"),
    ],
)
def test_a_foreign_repository_of_the_hub_is_refused(offline, tmp_path, config, words):
    put_on_the_hub_cache(tmp_path, "someone/other", config__json=lambda p: p.write_text(json.dumps(config)))
    with pytest.raises(DysurgeryError, match=words):
        build("hf-hub:someone/other")


def test_a_repository_that_cannot_be_had_names_no_architecture_and_so_builds_nothing(offline):
    with pytest.raises(DysurgeryError, match=r"cannot be built.*not in the cache") as caught:
        build("hf-hub:someone/unknown")
    assert not isinstance(caught.value, WeightsUnavailable)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", "inception_v3"])
def test_torchvision_weights_in_the_cache_are_taken_and_the_model_is_rebuilt_as_it_is(offline, tmp_path, capfd, name):
    entry = torchvision.models.get_model_weights(name).DEFAULT
    extra = {} if name == "squeezenet1_1" else {"init_weights": False}
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = torchvision.models.get_model(name, **extra).state_dict()
    weights = {k: torch.full(v.shape, 0.01, dtype=v.dtype) for k, v in shapes.items()}
    torch.save(weights, folder / entry.url.rpartition("/")[2])
    built = build(f"torchvision:{name}")
    assert all(torch.equal(v, weights[k]) for k, v in built.model.state_dict().items())
    again = rebuild(Source.from_json(json.loads(json.dumps(built.source.to_json()))))
    assert again.state_dict().keys() == built.model.state_dict().keys()
    assert getattr(again, "transform_input", None) == getattr(built.model, "transform_input", None)
    assert not offline
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def trained():
    torch.manual_seed(4)
    return timm.create_model(TINY, num_classes=4)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("a.pth", lambda s: s),
        ("a.pt", lambda s: {"state_dict": s, "epoch": 3}),
        ("a.bin", lambda s: {"model": s}),
        ("a.pth", lambda s: {"module." + k: v for k, v in s.items()}),
        ("a.pth", lambda s: {"_orig_mod.module." + k: v for k, v in s.items()}),
        ("a.pth", lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s}),
        ("a.safetensors", None),
    ],
)
def test_a_state_dict_is_read_however_it_is_wrapped(tmp_path, trained, name, wrap):
    path = tmp_path / name
    save_file(trained.state_dict(), path) if wrap is None else torch.save(wrap(trained.state_dict()), path)
    built = build(TINY, weights=str(path), model_args={"num_classes": 4})
    assert same_tensors(built.model, trained)
    assert not built.model.training


def changed(state, **new):
    return {k: v for k, v in {**state, **new}.items() if v is not None}


def test_a_file_from_before_batches_were_counted_is_read(tmp_path):
    state = timm.create_model("cifar_resnet20", width=4).state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")
    model = build("cifar_resnet20", weights=str(tmp_path / "old.safetensors"), model_args={"width": 4}).model
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items() if key in old)
    assert model.bn1.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: {k: v for i, (k, v) in enumerate(s.items()) if i >= 5}, r"5 missing \((\S+, ){3}\.\.\.\)"),
        (lambda s: changed(s, extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (lambda s: {f"encoder.{k}": v for k, v in s.items()}, r"missing .* unexpected \(encoder"),
        (
            lambda s: changed(s, **{"fc.weight": s["fc.weight"][:2], "fc.bias": s["fc.bias"][:2]}),
            r"2 of another shape \(fc.weight \(2, \d+\) instead of \(4, .*for its 2 classes .*num_classes=2$",
        ),
        (lambda s: changed(s, **{"fc.weight": s["fc.weight"].to(torch.int8)}), "quantised .*fc.weight torch.int8"),
        (lambda s: {"weights": s, "epoch": 3}, "no state dict: it holds weights, epoch"),
        (lambda s: {}, "no state dict"),
        (lambda s: [1, 2], "cannot be read as a state dict"),
        (lambda s: nn.Linear(2, 2), "pickled Python objects"),
        (lambda s: {"state_dict": s, "best": nn.Linear(2, 2)}, "pickled Python objects"),
    ],
)
def test_a_file_that_does_not_fit_says_where(tmp_path, trained, spoil, words):
    torch.save(spoil(trained.state_dict()), tmp_path / "a.pth")
    with pytest.raises(DysurgeryError, match=words) as caught:
        build(TINY, weights=str(tmp_path / "a.pth"), model_args={"num_classes": 4})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("text", ["", "<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"])
def test_a_file_of_another_kind_is_no_state_dict(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DysurgeryError, match="cannot be read as a state dict") as caught:
        build(TINY, weights=str(tmp_path / name))
    assert "weights_only=False" not in str(caught.value)


def test_weights_that_are_no_file_are_refused_before_anything_is_built(tmp_path):
    with pytest.raises(DysurgeryError, match="did you mean 'random'"):
        build(TINY, weights="randm")
    with pytest.raises(DysurgeryError, match="no such file"):
        build(TINY, weights=str(tmp_path))
