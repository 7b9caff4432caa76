import json
import socket
import sys
import threading
import time

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

import dysurgery
from dysurgery import weights as weight_files
from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.models import WeightsUnavailable, build, rebuild
from dysurgery.source import Source, describe

TINY = "test_resnet"  # the smallest ResNet of timm
SQUEEZE = "torchvision:squeezenet1_1"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches, and a hub that may be asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.fixture
def offline(caches, monkeypatch):
    """Empty caches and no network; the list of host names that were looked up."""
    asked = []

    def unknown(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return asked


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


# Names


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


# Arguments and input sizes


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


# Random weights


def test_random_weights_follow_the_seed_and_leave_the_random_state_alone():
    torch.manual_seed(11)
    state = torch.get_rng_state()
    a, b, c = (build(TINY, weights="random", seed=seed).model for seed in (1, 1, 2))
    rebuild(Source("timm", TINY))
    describe(a)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_tensors(a, b)
    assert not same_tensors(a, c)


# Pretrained weights


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


# Weights from a file


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


# A person's own file


def test_a_factory_in_a_file_is_called_with_its_arguments(factory_file):
    built = build(f"{factory_file}:tiny", model_args={"width": 4})
    assert built.model.stem.out_channels == 4
    assert built.source == Source("file", f"{factory_file}:tiny", {"width": 4})
    assert (built.label, built.input_size) == ("tiny", (3, 224, 224))
    assert built.preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert not built.model.training
    assert build(f"{factory_file}:TinyNet", weights="random").label == "TinyNet"


def test_a_model_may_say_its_input_size(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\n"
        "class A(nn.Conv2d):\n    input_size = (1, 20, 24)\n    def __init__(self): super().__init__(1, 1, 1)\n"
        "class B(A):\n    input_size = 224\n"
        "    default_cfg = {'input_size': [1, 28, 28], 'mean': [0.1], 'std': [0.2]}\n"
    )
    assert build(f"{path}:A").input_size == (1, 20, 24)
    assert build(f"{path}:A", input_size=(1, 8, 8)).input_size == (1, 8, 8)
    built = build(f"{path}:B")
    assert built.input_size == (1, 28, 28)
    assert built.preprocessing["std"] == [0.2]


@pytest.mark.parametrize(
    ("text", "factory", "kind", "words"),
    [
        ("def build(): pass", "biuld", UsageError, r"'biuld' does not exist .*did you mean 'build'.*defines build"),
        ("import torch\nnet = torch.nn.ReLU()", "net", UsageError, "no function or class"),
        ("def build(n): pass", "build", UsageError, "missing a required argument: 'n'.*--model-arg"),
        ("def build(): return 3", "build", DysurgeryError, "returns a int, not a torch.nn.Module"),
        ("x = 1\ndef build(:", "build", DysurgeryError, r"net.py, line 2: SyntaxError: invalid syntax"),
        ("\nimport nothing_like_it", "build", DysurgeryError, r"net.py, line 2: ModuleNotFoundError.*nothing_like_it"),
        ("import sys\nsys.exit(3)", "build", DysurgeryError, r"net.py, line 2: SystemExit: 3"),
        (
            "def build():\n    import json\n    json.loads('{')",
            "build",
            DysurgeryError,
            r"net.py, line 3: JSONDecodeError",
        ),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(tmp_path, text, factory, kind, words):
    (tmp_path / "net.py").write_text(text)
    path = list(sys.path)
    with pytest.raises(kind, match=words):
        build(f"{tmp_path / 'net.py'}:{factory}")
    assert sys.path == path


def test_an_argument_that_a_factory_does_not_take_is_named(factory_file):
    with pytest.raises(UsageError, match=r"no argument 'widht' \(did you mean 'width'\?\); it takes width, classes"):
        build(f"{factory_file}:tiny", model_args={"widht": 4})


def test_a_file_has_no_pretrained_weights(factory_file):
    with pytest.raises(UsageError, match="leave out --weights"):
        build(f"{factory_file}:tiny", weights="pretrained")


def test_two_files_each_import_their_own_neighbour(tmp_path):
    for folder, size in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "layers.py").write_text(f"SIZE = {size}\n")
        (tmp_path / folder / "net.py").write_text(
            "from torch import nn\nimport layers\n"
            "def net(): return nn.Conv2d(1, 1, layers.SIZE)\n"
            "def late():\n    from layers import SIZE\n    return nn.Conv2d(1, 1, SIZE)\n"
        )
    for folder, size in (("a", 3), ("b", 5), ("a", 3)):
        for factory in ("net", "late"):
            assert build(f"{tmp_path / folder / 'net.py'}:{factory}").model.kernel_size == (size, size)


def test_an_edit_of_the_file_is_seen(factory_file):
    first = build(f"{factory_file}:TinyNet").model
    assert type(build(f"{factory_file}:TinyNet").model) is type(first)
    factory_file.write_text(factory_file.read_text().replace("width=8", "width=6"))
    assert build(f"{factory_file}:TinyNet").model.stem.out_channels == 6


# Sources


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


# What a user made with timm


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
