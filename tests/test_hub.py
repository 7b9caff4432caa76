import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from torch import nn

import dysurgery
from dysurgery import checkpoint
from dysurgery.models import build
from dysurgery.source import Source
from dysurgery.train import finetune, load_recipe

COMMIT = "1" * 40


@pytest.fixture
def hub(offline, tmp_path, monkeypatch):
    """A hub that is a cache folder: what is uploaded lies there as huggingface_hub would have downloaded it."""

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, revision=None, commit_message=None):
        home = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder_path, home / "snapshots" / COMMIT)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return lambda repo: Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT


def test_a_timm_network_goes_to_the_hub_and_comes_back(hub):
    static = build("cifar_resnet20", weights="random", model_args={"width": 4}).model
    dynamic = dysurgery.convert(static, torch.randn(1, 3, 32, 32))
    assert dysurgery.push_to_hub(dynamic, "me/small", license="mit") == "https://huggingface.co/me/small"
    assert sorted(path.name for path in hub("me/small").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = dysurgery.load("hf-hub:me/small")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), dynamic.eval()(x))
    built = checkpoint.open_model("hf-hub:me/small@main")
    assert (built.label, built.input_size) == ("small", (3, 32, 32))
    card = huggingface_hub.ModelCard.load(hub("me/small") / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "dysurgery"
    assert 'dysurgery.load("hf-hub:me/small")' in card.text
    assert "| parameters |" in card.text


def test_a_run_fills_the_card_and_names_no_place_of_this_machine(hub, tmp_path):
    short = {"pretrain.epochs": 1, "finetune.epochs": 1, "temperature.warmup": 1, "train_images": 128}
    origin = {"data": "/home/somebody/digits", "model": "digits_net"}
    outcome = finetune(recipe=load_recipe("digits", short), out=tmp_path / "run", origin=origin)
    dysurgery.push_to_hub(tmp_path / "run", "me/digits")
    text = (hub("me/digits") / "README.md").read_text()
    for words in (f"{outcome.mean('dynamic'):.2f} %", "control: static", "600 validation images", "--recipe digits"):
        assert words in text
    assert all(
        "/home/" not in path.read_text() for path in hub("me/digits").glob("*.[mj]*") if path.suffix != ".safetensors"
    )
    assert "/home/" not in text
    assert str(tmp_path) not in text
    assert json.loads((hub("me/digits") / "config.json").read_text())["report"]["classes"] == list("0123456789")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(dysurgery.load("hf-hub:me/digits")(x), outcome.model.cpu()(x))


def test_a_network_of_ones_own_is_loaded_into_the_static_one_that_is_passed(hub):
    dynamic = dysurgery.convert(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(1, 3, 8, 8), layers="all")
    dysurgery.push_to_hub(dynamic, "me/own", source=Source("file", "/here/net.py:net"), input_size=(3, 8, 8))
    assert "net.py" not in (hub("me/own") / "config.json").read_text()
    with pytest.raises(dysurgery.UsageError, match="model="):
        dysurgery.load("hf-hub:me/own")
    again = dysurgery.load("hf-hub:me/own", model=nn.Sequential(nn.Conv2d(3, 4, 3)))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), dynamic(x))
    assert "model=static_network" in (hub("me/own") / "README.md").read_text()


def test_a_strangers_repository_runs_no_code(hub, tmp_path):
    dynamic = dysurgery.convert(build("digits_net", weights="random").model, torch.randn(1, 1, 8, 8))
    dysurgery.push_to_hub(dynamic, "me/evil")
    config = json.loads((hub("me/evil") / "config.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
    for source, words in (
        ({"kind": "file", "name": f"{tmp_path}/evil.py:net", "args": {}}, "model="),
        ({"kind": "timm", "name": "digits_net", "args": {"checkpoint_path": "/x"}}, "checkpoint_path"),
    ):
        (hub("me/evil") / "config.json").write_text(json.dumps(config | {"source": source}))
        with pytest.raises(dysurgery.DysurgeryError, match=words):
            checkpoint.open_model("hf-hub:me/evil")


def test_what_cannot_be_uploaded_is_said_in_a_sentence(offline, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(dysurgery.UsageError, match="no repository"):
        dysurgery.push_to_hub(model, "a/b/c")
    with pytest.raises(dysurgery.UsageError, match="says its own"):
        dysurgery.push_to_hub(tmp_path, "me/net", classes=["a"])
    with pytest.raises(dysurgery.DysurgeryError, match="no saved model"):
        dysurgery.push_to_hub(tmp_path, "me/net")
    with pytest.raises(dysurgery.DysurgeryError, match="me/net cannot be uploaded"):
        dysurgery.push_to_hub(model, "me/net", input_size=(3, 8, 8), token="hf_none")
    with pytest.raises(dysurgery.DysurgeryError, match=r"hf-hub:me/none cannot be (loaded|built)"):
        dysurgery.load("hf-hub:me/none")
