import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import write_pets
from torch import nn

import dysurgery
from dysurgery.nn import DynamicLayer

QUICK = ("--set", "finetune.epochs=1", "--set", "temperature.warmup=0.5", "--set", "finetune.batch_size=8",
         "--set", "finetune.workers=0", "--set", "finetune.warmup_epochs=0")  # fmt: skip
SERIAL = ("--set", "finetune.workers=0")


@pytest.fixture
def saved(run, factory_file, tmp_path):
    """A folder with a dynamic network for two classes whose kernels differ."""
    args = ("--model-arg", "classes=2", "--input-size", 3, 16, 16, "--start", "zero-sum", "--out", "net")
    assert run("convert", f"{factory_file}:tiny", *args).exit_code == 0
    return "net"


@pytest.fixture
def pets(tmp_path):
    return write_pets(tmp_path / "pets")


def test_batchnorm_is_folded_and_a_fresh_process_loads_the_result(run, saved):
    result = run("fold", saved)
    assert result.exit_code == 0, result.output
    for text in ("as it was", "BatchNorm folded", "1 of 1 BatchNorms folded, which is exact", "Saved to", "latency"):
        assert text in result.output
    before, x = dysurgery.load(saved), torch.randn(3, 3, 16, 16)
    after = dysurgery.load("net-folded")
    torch.testing.assert_close(after(x), before(x))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in after.modules())
    torch.save(x, "x.pt")
    script = "import torch, dysurgery; print(dysurgery.load('net-folded')(torch.load('x.pt')).tolist())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), after(x))


def test_with_data_what_may_be_static_is(run, saved, pets):
    result = run("fold", saved, "--data", pets, *SERIAL, "--tolerance", 100, "--json", "-")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [step["step"] for step in data["steps"]] == ["as it was", "BatchNorm folded", "3 layers static"]
    params = [step["params"] for step in data["steps"]]
    assert params[2] < params[0]
    assert all(0 <= step["accuracy"] <= 100 and step["latency_ms"] > 0 for step in data["steps"])
    assert data["steps"][0]["accuracy"] == data["steps"][1]["accuracy"]
    assert data["batchnorms"]["folded"] == {"norm": "stem"}
    assert sorted(data["demotion"]["demoted"]) == ["dense", "depthwise", "pointwise"]
    assert data["demotion"]["images"] == 8
    model = dysurgery.load(data["out"])
    assert not any(isinstance(module, DynamicLayer) for module in model.modules())
    config = json.loads(Path("net-folded/config.json").read_text())
    assert config["report"]["fold"]["steps"] == data["steps"]
    assert config["report"]["model"] == "tiny"  # what was known before is kept


def test_demotion_is_printed_layer_by_layer(run, saved, pets):
    output = run("fold", saved, "--data", pets, *SERIAL, "--no-bn", "--tolerance", 100).output
    assert "variation" in output
    assert "3 of 3 dynamic layers are static now, which is approximate: accuracy" in output
    assert "chosen and measured on the same 8 images" in output
    assert "BatchNorms" not in output


@pytest.mark.parametrize("measured", [True, False])
def test_all_says_that_it_is_approximate(run, saved, pets, measured):
    result = run("fold", saved, "--all", *(("--data", pets, *SERIAL) if measured else ()))
    assert result.exit_code == 0, result.output
    assert "All 3 dynamic layers are static, which is approximate" in result.output
    assert ("accuracy" in result.output) is measured
    assert ("without --data nothing is known" in result.output) is not measured
    assert not any(isinstance(module, DynamicLayer) for module in dysurgery.load("net-folded").modules())


def test_a_run_is_folded_by_its_name_and_trained_on_with_a_note(run, factory_file, pets):
    args = ("finetune", f"{factory_file}:tiny", "--input-size", 3, 16, 16, "--model-arg", "classes=2", "--data", pets)
    assert run(*args, *QUICK, "--out", "trip", "--no-control").exit_code == 0
    for place, data in (("trip", ("--data", pets, "--tolerance", 100)), ("trip/dynamic", ())):
        result = run("fold", place, *data, "--out", "out", "--force")
        assert result.exit_code == 0, result.output
    result = run("fold", "trip")
    assert result.exit_code == 0, result.output
    more = run("finetune", "trip-folded", "--data", pets, *QUICK, "--out", "more")
    assert more.exit_code == 0, more.output
    assert "BatchNorms of this network are folded away" in more.output
    again = run("fold", "more")
    assert again.exit_code == 0
    assert "its BatchNorm is folded already" in again.output
    assert "Nothing was written" in again.output
    assert not os.path.exists("more-folded")
    (pets / "train" / "dog").rename(pets / "train" / "wolf")
    (pets / "val" / "dog").rename(pets / "val" / "wolf")
    other = run("fold", "trip", "--data", pets, "--out", "other")
    assert other.exit_code == 2
    assert "(cat, wolf) are not those that trip was trained for (cat, dog)" in other.output
    assert not os.path.exists("other")


def test_a_run_of_several_seeds_asks_which(run, factory_file, pets):
    args = ("finetune", f"{factory_file}:tiny", "--input-size", 3, 16, 16, "--model-arg", "classes=2", "--data", pets)
    assert run(*args, *QUICK, "--out", "trip", "--no-control", "--seeds", "0,1").exit_code == 0
    asked = run("fold", "trip")
    assert asked.exit_code == 2
    assert os.path.join("trip", "seed-1") in asked.output
    assert run("fold", "trip/seed-1").exit_code == 0
    assert os.path.isdir("seed-1-folded")


def test_quiet_says_nothing(run, saved):
    assert run("fold", saved, "--quiet").output == ""


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("nowhere",), 2, "no folder 'nowhere'"),
        (("resnet18",), 2, "no folder 'resnet18'"),
        ((".",), 1, "no config.json"),
        (("net", "--tolerance", 1), 2, "say which"),
        (("net", "--all", "--tolerance", 1, "--data", "digits"), 2, "leave out --tolerance"),
        (("net", "--data", "digits", "--tolerance", 101), 2, "0..100"),
        (("net", "--no-bn"), 2, "nothing to do"),
        (("net", "--set", "data_dir=x"), 2, "say which data"),
        (("net", "--data", "digit"), 2, "did you mean 'digits'"),
        (("net", "--data", "digits"), 2, "digits has 10 classes and net knows 2"),
        (("net", "--out", "/dev/null/x"), 1, "cannot write"),
        (("net", "--out", "net"), 1, "--force"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(run, saved, args, code, words):
    result = run("fold", *args)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert os.listdir() == ["net"]


def test_a_static_network_has_its_norms_folded_and_nothing_to_make_static(run, factory_file, saved):
    assert run("fold", saved, "--all", "--out", "static").exit_code == 0
    result = run("fold", "static", "--all")
    assert result.exit_code == 2
    assert "static already" in result.stderr
    assert "folded already" in run("fold", "static").output
