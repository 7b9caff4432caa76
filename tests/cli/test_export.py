import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import dysurgery
from dysurgery import checkpoint
from dysurgery.train import finetune, load_recipe


@pytest.fixture
def run(run, factory_file):
    """Run the command line in a folder that holds the saved network ``tiny-dy4``; return its result."""
    built = checkpoint.open_model(f"{factory_file}:tiny", input_size=(3, 16, 16))
    checkpoint.save(
        dysurgery.convert(built.model, torch.randn(1, 3, 16, 16)),
        "tiny-dy4",
        source=built.source,
        input_size=built.input_size,
        preprocessing=built.preprocessing,
        report={"classes": ["ant", "bee", "cat", "dog", "eel"]},
    )
    return run


def test_a_saved_folder_becomes_an_onnx_file_with_everything_that_its_use_needs(run):
    result = run("export", "tiny-dy4", "--json", "figures.json")
    assert result.exit_code == 0, result.output
    for word in ("1x3x16x16", "5x3x16x16", "onnxruntime", "x -> output", "tiny-dy4.onnx"):
        assert word in result.output
    figures = json.loads(Path("figures.json").read_text())
    assert figures["relative_diff"] < 1e-4
    assert figures["size"] == os.path.getsize("tiny-dy4.onnx")
    assert [check["shapes"] for check in figures["checks"]] == [[[batch, 3, 16, 16]] for batch in (1, 2, 5)]
    session = onnxruntime.InferenceSession("tiny-dy4.onnx")
    known = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert known["classes"] == ["ant", "bee", "cat", "dog", "eel"]
    config = json.loads(Path("tiny-dy4/config.json").read_text())
    assert known == {**config["preprocessing"], "classes": known["classes"]}
    x = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    expected = dysurgery.load("tiny-dy4")(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_static_model_becomes_a_pt2_file_of_any_size_quietly(run, factory_file):
    spec = f"{factory_file}:tiny"
    result = run(
        "export", spec, "--input-size", 3, 16, 16, "--format", "pt2", "--out", "a/b.pt2", "--dynamic-size", "--quiet"
    )
    assert (result.exit_code, result.output) == (0, "")
    program = torch.export.load("a/b.pt2").module()
    x = torch.randn(2, 3, 40, 21)
    torch.testing.assert_close(program(x), checkpoint.open_model(spec).model(x))


def test_a_run_is_exported_with_its_latency_and_json_on_standard_output_is_all_there_is(run):
    short = {"pretrain.epochs": 1, "finetune.epochs": 1, "temperature.warmup": 1, "train_images": 64}
    finetune(recipe=load_recipe("digits", short), out="run", control=False)
    result = run("export", "run", "--json", "-", "--latency")
    figures = json.loads(result.stdout)
    assert figures["model"] == "run"
    assert len(figures["latency"]) == 8
    known = onnxruntime.InferenceSession("run.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(known["classes"]) == list("0123456789")
    assert json.loads(known["input_size"]) == [1, 8, 8]
    result = run("export", "tiny-dy4", "--json", "-", "--batch", "3")
    assert [check["shapes"] for check in json.loads(result.stdout)["checks"]] == [[[3, 3, 16, 16]]]


def test_an_existing_file_is_replaced_only_with_force(run):
    Path("tiny-dy4.onnx").write_text("old")
    result = run("export", "tiny-dy4")
    assert result.exit_code == 1
    assert "--force" in result.output
    assert Path("tiny-dy4.onnx").read_text() == "old"
    assert run("export", "tiny-dy4", "--force").exit_code == 0
    assert os.path.getsize("tiny-dy4.onnx") > 1000


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["tiny-dy4", "--format", "onx"], 2, ["onx", "pt2"]),
        (["tiny-dy4", "--out", "net.pt2"], 2, ["net.pt2", ".onnx"]),
        (["tiny-dy4", "--out", "/proc/no/where.onnx"], 1, ["/proc/no/where.onnx"]),
        (["tiny-dy4", "--batch", "1,two"], 2, ["1,two", "1,2,5"]),
        (["tiny-dy4", "--batch", "0"], 2, ["from 1 on"]),
        (["tiny-dy4", "--format", "pt2", "--opset", "20"], 2, ["opset"]),
        (["tiny-dy4", "--weights", "random"], 2, ["its own weights"]),
        (["./none"], 2, ["none", "saved folder"]),
        (["resnet81"], 2, ["resnet81", "resnet18"]),
    ],
)
def test_a_mistake_is_answered_by_one_sentence_and_leaves_nothing_behind(run, args, code, words):
    result = run("export", *args)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    assert os.listdir(".") == ["tiny-dy4"]


def test_a_missing_package_is_named_with_what_installs_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = run("export", "tiny-dy4")
    assert result.exit_code == 1
    assert "pip install onnxscript" in result.output
