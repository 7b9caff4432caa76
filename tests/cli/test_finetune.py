import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from dysurgery.cli import main
from tiny import write_pets

import dysurgery

SHORT = ("--set", "pretrain.epochs=1", "--set", "finetune.epochs=1", "--set", "temperature.warmup=0.5")
QUICK = ("--set", "finetune.epochs=2", "--set", "temperature.warmup=1", "--set", "finetune.batch_size=16",
         "--set", "finetune.workers=0", "--set", "finetune.warmup_epochs=0")  # fmt: skip

# No BatchNorm: its statistics would be those of a process's share of the batch, and torch has no SyncBatchNorm on CPUs.
NET = """
import torch
from torch import nn

def net(num_classes=2):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""


def run(*args):
    return CliRunner().invoke(main, ["finetune", *args])


def command(*args, python=("-m", "dysurgery.cli"), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *python, *args], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.fixture
def pets(tmp_path):
    return str(write_pets(tmp_path / "pets", train=24, val=8))


@pytest.fixture
def net_file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    return f"{path}:net"


def test_the_digits_recipe_prints_before_control_dynamic_and_their_difference():
    result = run("--recipe", "digits", *SHORT)
    assert result.exit_code == 0, result.output
    for text in ("static, before", "control", "dynamic, trained on", "dynamic against control", "points", "4.342k"):
        assert text in result.output


def test_json_holds_the_figures_and_the_history():
    data = json.loads(run("--recipe", "digits", *SHORT, "--json", "-").stdout)
    assert data["accuracy"]["difference"] == data["accuracy"]["dynamic"] - data["accuracy"]["control"]
    assert [entry["phase"] for entry in data["history"]] == ["before", "control", "dynamic"]
    assert data["recipe"]["finetune"]["epochs"] == 1
    assert set(data["latency_ms"]) == {"static", "dynamic"}


def test_a_timm_model_on_a_folder_of_images_gives_a_network_that_loads(pets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pets = os.path.relpath(pets)
    out = tmp_path / "run"
    args = ("cifar_resnet20", "--model-arg", "width=4", "--weights", "random", "--data", pets, *QUICK)
    result = run(*args, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert [entry["phase"] for entry in history(out)] == ["control", "control", "dynamic", "dynamic"]
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    model = dysurgery.load(out / "dynamic")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    # What is there is kept; a finished run is shown again, from anywhere, and data may move.
    assert run(*args, "--out", str(out)).exit_code == 2
    monkeypatch.chdir("/")
    again = run("--out", str(out), "--resume", "--json", "-")
    assert again.exit_code == 0, again.output
    shown = json.loads(again.stdout)
    assert shown["accuracy"] == json.loads((out / "result.json").read_text())["accuracy"]
    (tmp_path / "pets").rename(tmp_path / "moved")
    pets = str(tmp_path / "moved")
    assert run("--out", str(out), "--resume", "--data", pets).exit_code == 0
    # The result can be trained on, and has no control.
    more = run(str(out / "dynamic"), "--data", pets, *QUICK)
    assert more.exit_code == 0, more.output
    assert "no control" in more.output


def test_seeds_give_mean_and_spread(pets, net_file):
    result = run(net_file, "--input-size", "3", "20", "20", "--data", pets, *QUICK, "--seeds", "0,1")
    assert result.exit_code == 0, result.output
    assert "±" in result.output
    assert "2 seeds" in result.output


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_saves_and_says_how_to_go_on(pets, net_file, tmp_path, number, name):
    out = tmp_path / "run"
    args = ("finetune", net_file, "--input-size", "3", "20", "20", "--data", pets, *QUICK)
    process = command(*args, "--set", "finetune.epochs=400", "--out", str(out), "--no-control")
    deadline = time.monotonic() + 120
    while not (out / "history.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error
    done = len(history(out))
    assert 1 <= done < 400
    line = re.search(r"Go on with: dysurgery (.*)", error).group(1)
    goes_on = command(*shlex.split(line), "--set", "finetune.epochs=401")
    _, error = goes_on.communicate(timeout=120)
    assert goes_on.returncode == 2
    assert "400 -> 401" in error
    goes_on = command(*shlex.split(line))
    while len(history(out)) <= done and time.monotonic() < deadline:
        time.sleep(0.05)
    goes_on.send_signal(number)
    goes_on.communicate(timeout=120)
    assert goes_on.returncode == 128 + number
    assert [entry["number"] for entry in history(out)] == list(range(1, len(history(out)) + 1))


def test_two_processes_have_the_losses_of_one_with_the_same_batch(pets, net_file, tmp_path):
    args = ("finetune", net_file, "--input-size", "3", "20", "20", "--data", pets, *QUICK)
    found = {}
    for processes in (1, 2):
        launcher = (
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            "--standalone",
            "-m",
            "dysurgery.cli",
        )
        out = tmp_path / str(processes)
        done = command(*args, "--out", str(out), "--device", "cpu", python=launcher)
        output, error = done.communicate(timeout=300)
        assert done.returncode == 0, error
        assert output.count("dynamic, trained on") == 1  # only the first process speaks
        found[processes] = history(out)
    for one, two in zip(found[1], found[2], strict=True):
        assert (one["phase"], one["number"], one["tau"]) == (two["phase"], two["number"], two["tau"])
        for name in ("loss", "val_loss", "accuracy", "entropy"):
            assert two[name] == (None if one[name] is None else pytest.approx(one[name], rel=2e-4)), name


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--recipe", "digit"], "did you mean 'digits'"),
        (["--recipe", "digits", "--set", "finetune.epoch=1"], "did you mean 'epochs'"),
        (["--recipe", "digits", "--set", "finetune.epochs=x"], "int"),
        (["--recipe", "digits", "--seeds", "0,b"], "no list of seeds"),
        (["--recipe", "digits", "--seeds", "1,1"], "twice"),
        (["--recipe", "digits", "--device", "cud"], "no device 'cud'"),
        (["--recipe", "digits", "--resume"], "--out RUN --resume"),
        (["--recipe", "digits", "--weights", "pretrained"], "leave out --weights"),
        (["--recipe", "digits", "--data", "nowhere"], "no data 'nowhere'"),
        ([], "say which MODEL"),
        (["resnet18", "--weights", "random"], "say which data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_by_one_sentence(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert not any(tmp_path.iterdir())


def test_a_run_that_is_not_there_cannot_be_resumed(tmp_path):
    result = run("--recipe", "digits", "--out", str(tmp_path / "none"), "--resume")
    assert result.exit_code == 2
    assert "holds no run" in result.output
    assert not (tmp_path / "none").exists()
