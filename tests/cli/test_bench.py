import json
import os
from pathlib import Path

import pytest
import torch

import dysurgery
from dysurgery.train import finetune, load_recipe

QUICK = ("--seconds", 0.01, "--layout", "nchw")
TINY = ("--input-size", 3, 16, 16)
SHORT = {"pretrain.epochs": 1, "finetune.epochs": 1, "temperature.warmup": 1, "train_images": 64}
KEYS = {
    "model", "mode", "batch", "layout", "static_ms", "dynamic_ms", "grouped_ms", "ratio", "ratio_grouped", "static_mb",
    "dynamic_mb",
}  # fmt: skip


@pytest.fixture
def spec(factory_file):
    return f"{factory_file}:tiny"


def test_a_static_model_is_converted_and_measured_in_all_forms(run, spec):
    result = run(
        "bench", spec, *TINY, "--batch", "1,2", "--seconds", 0.01, "--train", "--same-layout", "--k", 2, "--autotune"
    )
    assert result.exit_code == 0, result.output
    for words in ("static", "grouped", "infer", "train", "nhwc", "Mult-Adds", "slowest dynamic layers", "depthwise"):
        assert words in result.output
    assert os.listdir() == []


def test_json_on_standard_output_is_all_there_is_and_the_picture_is_a_png(run, spec):
    result = run("bench", spec, *TINY, *QUICK, "--batch", 2, "--json", "-", "--picture", "bench.png", "--threads", 1)
    figures = json.loads(result.stdout)
    (row,) = figures["rows"]
    assert row.keys() >= KEYS
    assert (row["model"], row["mode"], row["batch"], row["layout"]) == ("tiny", "infer", 2, "nchw")
    assert {layer["path"] for layer in figures["layers"]} == {"depthwise", "pointwise", "dense"}
    assert figures["machine"]["threads"] == 1
    assert Path("bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_folder_is_measured_as_it_is_and_a_static_one_refused(run, spec):
    assert run("convert", spec, *TINY, "--out", "net").exit_code == 0
    result = run("bench", "net", *QUICK, "--batch", 2, "--no-layers", "--json", "-")
    assert json.loads(result.stdout)["layers"] == []
    assert json.loads(result.stdout)["input_size"] == [3, 16, 16]
    refused = run("bench", "net", "--k", 2)
    assert refused.exit_code == 2
    assert "is a dynamic network already: drop --k" in refused.output
    assert run("fold", "net", "--all", "--out", "static").exit_code == 0
    refused = run("bench", "static")
    assert refused.exit_code == 2
    assert "static is a static network" in refused.output
    assert "convert it (dysurgery convert)" in refused.output


def test_a_run_is_drawn_as_accuracy_against_cost_and_the_report_shows_the_bench(run):
    finetune(recipe=load_recipe("digits", SHORT), out="run", control=False)
    timing = {"network": "dynamic", "runtime": "onnxruntime", "images": 2, "milliseconds": 1.25}
    export = {"format": "onnx", "size": 1234, "opset": 20, "relative_diff": 1e-7, "latency": [timing]}
    Path("export.json").write_text(json.dumps(export))
    result = run(
        "bench", "run", *QUICK, "--batch", 2, "--tradeoff", "tradeoff.png", "--export", "export.json",
        "--json", "bench.json", "--quiet",
    )  # fmt: skip
    assert (result.exit_code, result.output) == (0, "")
    assert Path("tradeoff.png").read_bytes().startswith(b"\x89PNG")
    refused = run("bench", "run", *QUICK, "--batch", "1,2", "--tradeoff", "a.png", "--export", "export.json")
    assert refused.exit_code == 2
    assert "holds latencies for 2 images" in refused.output
    figures = json.loads(Path("bench.json").read_text())
    assert (figures["model"], figures["input_size"]) == ("run", [1, 8, 8])
    result = run("report", "run", "--html", "a.html", "--bench", "bench.json", "--export", "export.json")
    assert result.exit_code == 0, result.output
    page = Path("a.html").read_text()
    assert "<h2>Speed</h2>" in page
    assert f"{figures['rows'][0]['dynamic_ms']:.2f} ms" in page
    assert page.count("data:image/png") == 3
    wrong = run("report", "run", "--html", "b.html", "--bench", "export.json")
    assert wrong.exit_code == 2
    assert "export.json has no 'rows'" in wrong.output


def test_half_precision_that_does_not_run_is_a_sentence(run, spec, monkeypatch):
    def refuse(self, x):
        if x.dtype == torch.float16:
            raise RuntimeError('"mean" not implemented for Half. Sorry')
        return forward(self, x)

    forward = dysurgery.DynamicConv2d.forward
    monkeypatch.setattr(dysurgery.DynamicConv2d, "forward", refuse)
    result = run("bench", spec, *TINY, *QUICK, "--batch", 2, "--dtype", "float16")
    assert result.exit_code == 1
    assert 'torch.float16) cannot be measured: RuntimeError: "mean" not implemented for Half' in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--batch", "1,two"], 2, "--batch is numbers separated by commas"),
        (["--batch", "0"], 2, "1 image or more, got 0"),
        (["--batch", "1,-3"], 2, "1 image or more, got 1, -3"),
        (["--layout", "nhcw"], 2, "did you mean 'nhwc'"),
        (["--threads", "0"], 2, "1 or more, got 0"),
        (["--seconds", "-1"], 2, "more than 0, got -1"),
        (["--dtype", "int8"], 2, "int8"),
        (["--device", "tpu"], 2, "no device 'tpu'"),
        (["--tradeoff", "a.png"], 2, "a finished run of dysurgery finetune"),
        (["--export", "a.json"], 2, "--tradeoff"),
        (["--kinds", "depthwise", "--exclude", "depthwise"], 2, "nothing"),
        (["--picture", "/dev/null/a.png", *QUICK, "--batch", "2", "--no-layers"], 1, "cannot write"),
    ],
)
def test_a_mistake_is_answered_by_one_sentence_and_leaves_nothing_behind(run, spec, args, code, words):
    result = run("bench", spec, *TINY, *args)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert "Traceback" not in result.output
    assert os.listdir() == []


def test_an_unknown_model_is_named(run):
    result = run("bench", "resnet81")
    assert result.exit_code == 2
    assert "resnet18" in result.output
