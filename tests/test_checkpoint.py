import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import dysurgery
from dysurgery import checkpoint, models
from dysurgery.nn import FusedActivation
from dysurgery.nn.links import links_of
from dysurgery.source import Source

IMAGE = (1, 3, 32, 32)


@pytest.fixture
def dynamic():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=7).eval()
    return dysurgery.convert(model, torch.randn(IMAGE), k=3, reduction=2, gate="softmax")


def test_a_model_whose_modules_ask_for_a_version_is_loaded_from_a_folder_and_from_a_file(tmp_path):
    model = torchvision.models.mnasnet0_5(weights=None).eval()
    image = torch.randn(2, 3, 64, 64)
    dynamic = dysurgery.convert(model, image)
    dysurgery.save(dynamic, tmp_path / "saved", source=Source("torchvision", "mnasnet0_5"))
    torch.testing.assert_close(dysurgery.load(tmp_path / "saved")(image), dynamic(image))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    built = models.build("torchvision:mnasnet0_5", weights=str(tmp_path / "weights.pth"))
    torch.testing.assert_close(built.model(image), model(image))


def test_a_timm_model_comes_back_with_nothing_but_its_folder(dynamic, tmp_path):
    dysurgery.set_temperature(dynamic, 7.5)
    dysurgery.save(dynamic, tmp_path / "saved")
    loaded = dysurgery.load(tmp_path / "saved")
    x = torch.randn(2, *IMAGE[1:])
    torch.testing.assert_close(loaded(x), dynamic(x), rtol=0, atol=0)
    assert type(loaded) is type(dynamic)
    assert not loaded.training
    assert dysurgery.temperature(loaded) == 7.5
    assert list(loaded.state_dict()) == list(dynamic.state_dict())


def test_the_folder_holds_two_files_and_no_pickle(dynamic, tmp_path):
    folder = dysurgery.save(dynamic, tmp_path / "saved", report={"note": "kept"})
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert set(tensors) == set(dynamic.state_dict())
    config = json.loads((folder / "config.json").read_text())
    assert config["source"]["name"] == "resnet10t"
    assert config["layers"]["layer1.0.conv1"] == {"k": 3, "reduction": 2, "gate": "softmax"}
    assert config["report"] == {"note": "kept"}
    assert set(config["versions"]) == {"dysurgery", "python", "torch", "torchvision", "timm"}


def test_loading_leaves_the_random_state_alone(dynamic, tmp_path):
    dysurgery.save(dynamic, tmp_path / "saved")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    dysurgery.load(tmp_path / "saved")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_come_back_as_they_were_saved(dynamic, tmp_path, dtype):
    dysurgery.save(dynamic.to(dtype), tmp_path / "saved")
    loaded = dysurgery.load(tmp_path / "saved")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for a, b in zip(loaded.state_dict().values(), dynamic.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_shared_modules_and_channels_last_survive(tmp_path):
    model = timm.create_model("coat_lite_tiny", img_size=64, num_classes=3).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64)
    dynamic = dysurgery.convert(model, x)
    source = Source("timm", "coat_lite_tiny", {"img_size": 64, "num_classes": 3})
    dysurgery.save(dynamic, tmp_path / "saved", source=source)
    torch.testing.assert_close(dysurgery.load(tmp_path / "saved")(x), dynamic(x))


class Custom(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.weight = nn.Parameter(torch.randn(width, width, 3, 3) * 0.1)
        self.twice = nn.Conv2d(width, width, 1)

    def forward(self, x, mask=None):
        x = self.stem(x) if mask is None else self.stem(x * mask)
        x = F.dropout(F.conv2d(x, self.weight), 0.5, self.training)
        return self.twice(self.twice(x)).mean((2, 3))


def test_a_model_of_ones_own_is_passed_in(tmp_path):
    dynamic = dysurgery.convert(Custom().eval(), torch.randn(IMAGE))
    dysurgery.save(dynamic, tmp_path / "saved")
    with pytest.raises(dysurgery.UsageError, match="model="):
        dysurgery.load(tmp_path / "saved")
    x = torch.randn(2, *IMAGE[1:])
    torch.testing.assert_close(dysurgery.load(tmp_path / "saved", model=Custom())(x), dynamic(x))


def test_a_model_that_is_one_convolution_comes_back(tmp_path):
    images = torch.randn(2, 3, 8, 8)
    dynamic = dysurgery.convert(nn.Conv2d(3, 8, 3), images, layers="all").eval()
    dysurgery.save(dynamic, tmp_path / "one")
    loaded = dysurgery.load(tmp_path / "one", model=nn.Conv2d(3, 8, 3))
    torch.testing.assert_close(loaded(images), dynamic(images), rtol=0, atol=0)


def test_a_graph_comes_back_as_a_graph(tmp_path):
    dynamic = dysurgery.convert(Custom().eval(), torch.randn(IMAGE), as_graph=True)
    dysurgery.save(dynamic, tmp_path / "saved")
    loaded = dysurgery.load(tmp_path / "saved", model=Custom())
    assert isinstance(loaded, torch.fx.GraphModule)
    x = torch.randn(2, *IMAGE[1:])
    torch.testing.assert_close(loaded(x), dynamic(x))
    for model in (loaded.train(), dynamic.train()):
        torch.manual_seed(1)
        model.seen = model(x).detach()
    torch.testing.assert_close(loaded.seen, dynamic.seen)


def test_a_wrong_model_is_refused(dynamic, tmp_path):
    dysurgery.save(dynamic, tmp_path / "saved")
    with pytest.raises(dysurgery.DysurgeryError, match=r"conv1\.3"):
        dysurgery.load(tmp_path / "saved", model=Custom())
    with pytest.raises(dysurgery.DysurgeryError, match=r"fc\.weight"):
        dysurgery.load(tmp_path / "saved", model=timm.create_model("resnet10t", num_classes=8))


@pytest.mark.parametrize(
    ("number", "unknown"),
    [(1, {"static", "biases", "norms", "ways", "links"}), (2, {"ways", "links"}), (3, {"links"})],
    ids=["1", "2", "3"],
)
def test_a_folder_of_an_older_format_still_loads(dynamic, tmp_path, number, unknown):
    folder = dysurgery.save(dynamic, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == 4
    old = {key: value for key, value in config.items() if key not in unknown} | {"format": number}
    (folder / "config.json").write_text(json.dumps(old))
    x = torch.randn(2, *IMAGE[1:])
    torch.testing.assert_close(dysurgery.load(folder)(x), dynamic(x), rtol=0, atol=0)


def test_what_was_folded_and_frozen_is_in_the_config_and_comes_back(dynamic, tmp_path):
    with torch.no_grad():
        for parameter in dynamic.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model = dysurgery.freeze(dysurgery.fuse_bn(dynamic, torch.randn(IMAGE)), layers="layer1.0.conv2")
    folder = dysurgery.save(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert config["static"] == ["layer1.0.conv2"]
    assert "layer1.0.conv2" not in config["layers"]
    assert {"layer1.0.bn1", "layer1.0.bn2"} <= set(config["norms"])
    assert {"conv1.0", "layer1.0.conv1", "layer1.0.conv2"} <= set(config["biases"])
    assert ["layer2.0.conv1", "layer2.0.act1", "layer2.0.conv2"] in config["links"]
    x = torch.randn(2, *IMAGE[1:])
    loaded = dysurgery.load(folder)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert links_of(loaded) == links_of(model)
    assert type(loaded.get_submodule("layer2.0.act1")) is FusedActivation
    # Wrapped in another module, what was done to it is at other paths.
    wrapped = nn.Sequential(nn.Identity(), loaded)
    static = nn.Sequential(nn.Identity(), timm.create_model("resnet10t", num_classes=7))
    again = dysurgery.load(dysurgery.save(wrapped, tmp_path / "wrapped"), model=static)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    with pytest.raises(dysurgery.DysurgeryError, match="does not fit"):
        dysurgery.load(folder, model=timm.create_model("resnet18", num_classes=7))


def damage(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: damage(f, "config.json", "{"), "cannot be read"),
        (lambda f: damage(f, "config.json", "[]"), "format"),
        (lambda f: damage(f, "config.json", '{"format": 99}'), "99, which a newer version"),
        (lambda f: damage(f, "config.json", '{"format": 2}'), "damaged"),
        (lambda f: damage(f, "config.json", '{"format": 1}'), "damaged"),
        (lambda f: damage(f, "model.safetensors", "rubbish"), "does not fit"),
        (lambda f: os.truncate(f / "model.safetensors", 10_000), "does not fit"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(dynamic, tmp_path, spoil, words):
    folder = dysurgery.save(dynamic, tmp_path / "saved")
    spoil(folder)
    with pytest.raises(dysurgery.DysurgeryError, match=words):
        dysurgery.load(folder)


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(dynamic, tmp_path, monkeypatch):
    folder = dysurgery.save(dynamic, tmp_path / "saved")
    before = (folder / "config.json").read_bytes()

    def full(model, path):
        (tmp_path / os.path.relpath(path, tmp_path)).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_model", full)
    with pytest.raises(dysurgery.DysurgeryError, match="No space left"):
        dysurgery.save(dynamic, folder, force=True)
    assert os.listdir(tmp_path) == ["saved"]
    assert (folder / "config.json").read_bytes() == before


def test_a_kill_while_writing_leaves_the_old_folder_whole(dynamic, tmp_path):
    folder = dysurgery.save(dynamic, tmp_path / "saved")
    script = """
        import os, signal, sys, safetensors.torch, dysurgery
        model = dysurgery.load(sys.argv[1])
        write = safetensors.torch.save_model
        def killed(model, path):
            write(model, path)
            os.kill(os.getpid(), signal.SIGKILL)
        safetensors.torch.save_model = killed
        dysurgery.save(model, sys.argv[1], force=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(folder)])
    assert done.returncode == -9
    dysurgery.load(folder)


def test_open_model_takes_a_folder_or_a_name(dynamic, tmp_path):
    folder = dysurgery.save(dynamic, tmp_path / "saved", input_size=(3, 32, 32), preprocessing={"mean": [0.5]})
    opened = checkpoint.open_model(str(folder))
    assert (opened.label, opened.input_size, opened.preprocessing) == ("saved", (3, 32, 32), {"mean": [0.5]})
    with pytest.raises(dysurgery.UsageError, match="its own weights"):
        checkpoint.open_model(str(folder), weights="random")
    assert checkpoint.open_model("resnet18", weights="random").source.kind == "timm"
