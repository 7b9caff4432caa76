import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dysurgery
from dysurgery import checkpoint


def converted(run, factory_file, *args):
    return run("convert", f"{factory_file}:tiny", "--input-size", 3, 16, 16, *args)


def test_convert_writes_a_folder_that_loads_and_computes_the_same(run, factory_file):
    result = converted(run, factory_file)
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir("tiny-dy4")) == ["config.json", "model.safetensors"]
    static = checkpoint.open_model(f"{factory_file}:tiny").model.eval()
    dynamic = dysurgery.load("tiny-dy4")
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(dynamic(x), static(x))
    assert dysurgery.temperature(dynamic) == 1


def test_the_report_shows_every_convolution_and_both_totals(run, factory_file):
    output = converted(run, factory_file).output
    for text in (
        "stem",
        "first convolution",
        "depthwise",
        "pointwise",
        "parameters",
        "pooling",
        "1 Mult-Add = 2 FLOPs",
    ):
        assert text in output
    assert "tiny: 3 of 4 convolutions become dynamic" in output


def test_json_on_standard_output_is_nothing_but_json(run, factory_file):
    result = converted(run, factory_file, "--json", "-", "--k", 2)
    data = json.loads(result.stdout)
    assert {"model", "k", "params", "mult_adds", "max_abs_diff", "relative_diff", "sites", "out"} <= set(data)
    assert data["model"] == "tiny"
    assert data["k"] == 2
    assert data["params"]["dynamic"] > data["params"]["static"]
    mult_adds = data["mult_adds"]
    extra = mult_adds["pooling"] + mult_adds["attention"] + mult_adds["aggregation"]
    assert mult_adds["dynamic"] - mult_adds["static"] == extra
    assert [site["decision"] for site in data["sites"]] == ["static", "dynamic", "dynamic", "dynamic"]
    assert data["relative_diff"] < 1e-5
    assert os.path.isdir(data["out"])


def test_quiet_says_nothing(run, factory_file):
    assert converted(run, factory_file, "--quiet").output == ""


def test_an_existing_folder_is_refused_and_kept_without_force(run, factory_file):
    assert converted(run, factory_file).exit_code == 0
    before = Path("tiny-dy4/config.json").read_text()
    again = converted(run, factory_file, "--gate", "sigmoid")
    assert again.exit_code == 1
    assert "--force" in again.output
    assert Path("tiny-dy4/config.json").read_text() == before
    assert converted(run, factory_file, "--gate", "sigmoid", "--force").exit_code == 0
    assert Path("tiny-dy4/config.json").read_text() != before
    assert os.listdir(".") == ["tiny-dy4"]


def test_force_does_not_replace_a_folder_with_other_files(run, factory_file):
    os.mkdir("precious")
    Path("precious/thesis.txt").write_text("years")
    result = converted(run, factory_file, "--out", "precious", "--force")
    assert result.exit_code == 1
    assert "thesis.txt" in result.output
    assert os.listdir("precious") == ["thesis.txt"]


def test_converting_a_dynamic_model_again_says_that_there_is_nothing_to_do(run, factory_file):
    converted(run, factory_file)
    result = run("convert", "tiny-dy4")
    assert result.exit_code == 0
    assert "Nothing to convert" in result.output
    assert "already dynamic" in result.output
    assert os.listdir(".") == ["tiny-dy4"]


def test_an_edited_plan_is_followed(run, factory_file):
    assert run("plan", f"{factory_file}:tiny", "--input-size", 3, 16, 16, "--json", "plan.json").exit_code == 0
    data = json.loads(Path("plan.json").read_text())
    for site in data["sites"]:
        site["decision"] = "dynamic" if site["path"] in ("stem", "dense") else "static"
    Path("plan.json").write_text(json.dumps(data))
    result = converted(run, factory_file, "--plan", "plan.json")
    assert result.exit_code == 0, result.output
    assert set(checkpoint.read_config("tiny-dy4").layers) == {"stem", "dense"}


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["convert", "resnet81"], 2, ["resnet81", "did you mean", "resnet18"]),
        (["convert", "torchvision:resnet81"], 2, ["resnet81", "resnet18"]),
        (["convert", "nowhere.py:tiny"], 2, ["nowhere.py"]),
        (["convert", "{file}:tinny"], 2, ["tinny", "tiny"]),
        (["convert", "{file}:broken"], 1, ["no disk today"]),
        (["convert", "{file}:no_model"], 1, ["str"]),
        (["convert", "{file}:tiny", "--include", "densse"], 2, ["densse", "dense"]),
        (["convert", "{file}:tiny", "--include", "("], 2, ["regular expression"]),
        (["convert", "{file}:tiny", "--kinds", "wide"], 2, ["wide", "pointwise"]),
        (["convert", "{file}:tiny", "--k", "1"], 2, ["k is at least 2"]),
        (["convert", "{file}:tiny", "--k", "many"], 2, ["many"]),
        (["convert", "{file}:tiny", "--gate", "sigmoid", "--start", "copies"], 2, ["zero-sum"]),
        (["convert", "{file}:tiny", "--include", "stem"], 2, ["first convolution"]),
        (["convert", "{file}:tiny", "--input-size", "1", "16", "16"], 1, ["does not run", "1, 16, 16"]),
        (["convert", "{file}:tiny", "--model-arg", "depth=3"], 2, ["depth"]),
        (["convert", "{file}:tiny", "--model-arg", "depth"], 2, ["key=value"]),
        (["convert", "{file}:tiny", "--plan", "none.json"], 1, ["none.json"]),
        (["convert", "{file}:tiny", "--weights", "none.safetensors"], 1, ["none.safetensors"]),
        (["convert", "{file}:tiny", "--out", "/proc/no/where"], 1, ["/proc/no/where"]),
        (["plan", "resnet18", "--layers", "some"], 2, ["all-but-first"]),
        (["cost", "resnet81"], 2, ["resnet18"]),
    ],
)
def test_a_mistake_is_answered_by_one_sentence_and_leaves_nothing_behind(run, factory_file, args, code, words):
    result = run(*(arg.format(file=factory_file) for arg in args))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    assert os.listdir(".") == []


def test_weights_that_cannot_be_had_cost_no_report_and_write_nothing(run):
    result = run("convert", "resnet18", "--input-size", 3, 64, 64)
    assert result.exit_code == 1
    assert "45.47M" in result.output
    assert "--weights random" in result.output
    assert os.listdir(".") == []


def test_weights_of_a_file_are_loaded_strictly(run, factory_file):
    static = checkpoint.open_model(f"{factory_file}:tiny").model.eval()
    torch.nn.init.normal_(static.classifier.bias)
    torch.save({"state_dict": {f"module.{k}": v for k, v in static.state_dict().items()}}, "good.pth")
    assert converted(run, factory_file, "--weights", "good.pth").exit_code == 0
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(dysurgery.load("tiny-dy4")(x), static(x))
    torch.save({k: v for k, v in static.state_dict().items() if k != "stem.bias"}, "bad.pth")
    result = converted(run, factory_file, "--weights", "bad.pth", "--force")
    assert result.exit_code == 1
    assert "stem.bias" in result.output


def test_a_saved_folder_loads_in_a_fresh_process(run, factory_file):
    converted(run, factory_file)
    code = (
        "import torch, dysurgery; m = dysurgery.load('tiny-dy4'); torch.manual_seed(0);"
        "print(m(torch.randn(2, 3, 16, 16)).double().sum().item())"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch.manual_seed(0)
    expected = dysurgery.load("tiny-dy4")(torch.randn(2, 3, 16, 16)).double().sum().item()
    assert float(fresh.stdout) == pytest.approx(expected, rel=1e-6)


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "dysurgery.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert dysurgery.__version__ in done.stdout


def test_a_folder_and_its_file_may_move_together(run, factory_file, tmp_path):
    converted(run, factory_file, "--out", tmp_path / "saved")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    factory_file.rename(moved / factory_file.name)
    (tmp_path / "saved").rename(moved / "saved")
    assert dysurgery.load(moved / "saved")(torch.randn(1, 3, 16, 16)).shape == (1, 5)
