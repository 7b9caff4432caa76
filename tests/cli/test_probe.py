import dataclasses
import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from dysurgery.cli import main, tables
from tiny import write_images, write_pets

import dysurgery
from dysurgery.models import build
from dysurgery.train import finetune, load_recipe

PICTURES = ["attention.png", "entropy.png", "images.png", "interventions.png", "probe.json"]


def run(*args):
    return CliRunner().invoke(main, ["probe", *map(str, args)])


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run of the digits recipe with two seeds, as the command line keeps it."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    short = {"pretrain.epochs": 1, "finetune.epochs": 2, "temperature.warmup": 1}
    origin = {"data": "digits", "model": "digits_net"}
    finetune(recipe=load_recipe("digits", short), out=folder, seeds=(3, 4), origin=origin, control=False)
    return folder


@pytest.fixture
def saved(tmp_path):
    """A dynamic network for images of cats and dogs."""
    built = build("cifar_resnet20", weights="random", model_args={"width": 4, "num_classes": 2})
    dynamic = dysurgery.convert(built.model, torch.randn(1, *built.input_size))
    return dysurgery.save(dynamic, tmp_path / "saved", source=built.source, input_size=built.input_size,
                          preprocessing=built.preprocessing)  # fmt: skip


def test_a_run_is_looked_at_on_its_own_data(kept, tmp_path):
    out = tmp_path / "out"
    result = run(kept, "--out", out, "--json", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("digits/seed-3/dynamic on digits: 3 dynamic layers, K = 4, tau = 1\n600 images")
    for words in ("learned", "averaged over the kernels", "shuffled across images", "all that see 8x8", "entropy"):
        assert words in result.output
    assert sorted(path.name for path in out.iterdir()) == PICTURES
    figures = json.loads((tmp_path / "figures.json").read_text())
    known = json.loads((kept / "result.json").read_text())["seeds"][0]["dynamic"]
    assert figures["accuracy"] == pytest.approx(known)
    assert len(figures["effects"]) == 4 + 2 * 5 + 3 * 4
    assert run(kept, "--out", out).exit_code == 0  # in place of the earlier one's
    # A seed, or the folder of the network itself, is as good.
    for place in (kept / "seed-4", kept / "seed-4" / "dynamic"):
        again = run(place, "--images", 50, "--layer-images", 0, "--quiet", "--json", "-")
        assert json.loads(again.stdout)["label"] == "digits/seed-4/dynamic"
        assert {effect["scope"] for effect in json.loads(again.stdout)["effects"]} == {"all"}


def test_the_tables_fit_100_columns(kept, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    output = run(kept, "--images", 50).output
    assert max(map(len, output.splitlines())) <= 100
    assert "…" not in output


def test_many_layers_are_grouped_by_resolution(capsys):
    net = torch.nn.Sequential(dysurgery.DynamicConv2d(3, 3, 3, stride=2), dysurgery.DynamicConv2d(3, 3, 3),
                              torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # fmt: skip
    report = dysurgery.probe(net, torch.randn(8, 3, 16, 16))
    more = [dataclasses.replace(report.layers[1], path=f"more.{n}") for n in range(50)]
    deep = dataclasses.replace(report, layers=(*report.layers, *more))
    tables.probe_tables(tables.console(), deep, "noise")
    output = capsys.readouterr().out
    assert "52 dynamic layers" in output
    assert "agreement" in output
    assert "mean of 51 layers" in output
    assert "more.7" not in output
    assert len(output.splitlines()) < 20


def test_a_saved_folder_takes_folders_of_images_with_classes_and_without(saved, tmp_path):
    pets = write_pets(tmp_path / "pets")
    for folder in (pets, pets / "val"):
        figures = json.loads(run(saved, "--data", folder, "--layer-images", 0, "--json", "-").stdout)
        assert (figures["images"], figures["classes"]) == (8, ["cat", "dog"])
        assert figures["accuracy"] is not None
    write_images(tmp_path / "flat", 3)
    for args in ((tmp_path / "flat",), (pets, "--no-labels"), ("digits", "--no-labels", "--images", 3)):
        figures = json.loads(run(saved, "--data", *args, "--json", "-").stdout)
        assert figures["accuracy"] is None
        assert all(effect["agreement"] == 100 for effect in figures["effects"])  # freshly converted


def test_a_layer_is_chosen_for_the_images(kept, tmp_path):
    assert run(kept, "--images", 40, "--out", tmp_path / "out", "--layer", "9").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == PICTURES


def test_mistakes_are_answered_by_one_sentence(kept, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pets = write_pets(tmp_path / "pets")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    built = build("digits_net", weights="random")
    dysurgery.save(built.model, tmp_path / "static", source=built.source, input_size=(1, 8, 8))
    birds = tmp_path / "birds"
    for name in ("crow", "duck"):
        write_images(birds / name, 2)
    third = pets / "val" / "wolf"
    cases = [
        (["nowhere"], 2, "no folder 'nowhere'"),
        (["save"], 2, "did you mean 'saved'"),
        ([saved], 2, "say which images to look at: --data DATA"),
        ([tmp_path / "empty"], 1, "no saved model: it has no config.json"),
        (["static", "--data", "digits"], 2, "static is static"),
        ([kept / "seed-3" / "before"], 2, "before is static"),
        ([saved, "--data", "digits"], 2, "the data has 10 classes and saved has 2 outputs"),
        ([kept, "--data", pets], 2, "has other classes (cat, dog) than digits/seed-3/dynamic was trained for"),
        ([saved, "--data", tmp_path / "empty"], 1, "has no images in it"),
        ([saved, "--data", "digit"], 2, "did you mean 'digits'"),
        ([kept, "--layer", "33"], 2, "no dynamic layer '33' (did you mean '3'"),
        ([saved, "--data", pets, "--layer", "layer1.0.conv"], 2, "did you mean 'layer1.0.conv2'"),
        ([kept, "--out", tmp_path / "file"], 1, "it exists and is no folder"),
        ([kept, "--set", "val_pat=odd"], 2, "did you mean 'val_part'"),
        ([kept, "--device", "cud"], 2, "no device 'cud'"),
        ([kept, "--images", "0"], 2, "0 is not in the range"),
        ([saved, "--data", pets / "val" / "cat", "--images", "1"], 2, "batches of two images or more"),
    ]
    for args, code, words in cases:
        result = run(*args)
        assert result.exit_code == code, (args, result.output)
        assert words in re.sub(r"\s+", " ", result.output), args
        assert "Traceback" not in result.output
    third.mkdir()
    write_images(third, 2)
    assert "classes of" in run(saved, "--data", pets).output
    result = run(saved, "--data", pets / "val")
    assert (result.exit_code, "3 classes and saved has 2 outputs" in result.output) == (2, True)
    (pets / "val" / "cat" / "0.png").write_bytes(b"broken")
    result = run(saved, "--data", pets / "val", "--no-labels")
    assert (result.exit_code, "cannot be read as an image" in result.output) == (1, True)


def test_data_that_are_gone_and_runs_that_are_unfinished_are_said(kept, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(kept, moved)
    known = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps({**known, "origin": {"data": str(tmp_path / "gone")}}))
    result = run(moved)
    assert result.exit_code == 2
    assert "no longer there: say where they are with --data" in re.sub(r"\s+", " ", result.output)
    assert run(moved, "--data", "digits", "--images", 20).exit_code == 0
    # A run that was made in Python keeps no origin, but the name of its data.
    (moved / "run.json").write_text(json.dumps({**known, "origin": {}}))
    assert run(moved, "--images", 20).exit_code == 0
    shutil.rmtree(moved / "seed-3")
    shutil.rmtree(moved / "seed-4")
    result = run(moved)
    assert result.exit_code == 1
    assert "no dynamic network yet: finish it with dysurgery finetune" in re.sub(r"\s+", " ", result.output)


def test_the_attention_is_that_of_the_images_of_the_run(kept):
    """The half of the validation images that the recipe chose is looked at, unless another is asked for."""
    assert json.loads(run(kept, "--set", "val_part=odd", "--json", "-").stdout)["images"] == 300
