import os
import signal
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from tiny import net

import dysurgery
from dysurgery import DysurgeryError, UsageError
from dysurgery.autotune import ways_of
from dysurgery.nn.execution import Situation
from dysurgery.train.loop import Interrupted, train
from dysurgery.train.recipe import Augment, Temperature
from dysurgery.train.state import STATE, differences, read_state, write_state

EVERYTHING = {
    "opt": "adamw", "lr": 0.01, "ema_decay": 0.9, "warmup_epochs": 1.0, "keep": "best", "accumulate": 2,
    "clip_grad": 1.0,
}  # fmt: skip


def dynamic():
    return dysurgery.convert(net(dropout=0.3).eval(), torch.randn(1, 3, 8, 8), seed=0)


def same(left, right):
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stopping_after(steps):
    left = iter([False] * steps)
    return lambda: next(left, True)


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, {"amp": "fp16"}, {"sched": "plateau", "sched_on": "epoch"}], ids=str
)
def test_a_run_stopped_after_any_step_ends_with_the_same_weights_and_history(job, tmp_path, options):
    augment = Augment(crop="rrc", color_jitter=0.3, mixup=0.3, random_erasing=0.5)
    common = {"temperature": Temperature(30, 1, 2), "augment": augment, **options}
    whole, trained = train(job(dynamic(), **common))
    for steps in range(12):  # three epochs of three steps and a batch to validate on
        folder = tmp_path / str(steps)
        with pytest.raises(Interrupted, match=f"after step {steps - steps // 4 + (steps % 4 < 3)} "):
            train(job(dynamic(), **common, folder=folder, asked_to_stop=stopping_after(steps)))
        epochs, resumed = train(job(dynamic(), **common, folder=folder))
        assert same(resumed, trained), steps
        assert [(e.loss, e.accuracy, e.lr, e.tau, e.entropy) for e in epochs] == [
            (e.loss, e.accuracy, e.lr, e.tau, e.entropy) for e in whole
        ]


def test_the_ways_that_were_measured_once_stay_for_the_whole_run(job, tmp_path, monkeypatch):
    def fastest(layer, call, train, seconds):
        return Situation.of(call.inputs(), train), "each", "grouped"

    monkeypatch.setattr(sys.modules["dysurgery.autotune"], "_fastest", fastest)
    with pytest.raises(Interrupted):
        train(job(dynamic(), autotune=True, folder=tmp_path, asked_to_stop=stopping_after(4)))
    ways = read_state(tmp_path)["ways"]
    assert ways
    monkeypatch.setattr("dysurgery.train.loop.autotune", None)  # nobody measures again
    _, trained = train(job(dynamic(), autotune=True, folder=tmp_path))
    assert ways_of(trained) == ways
    assert all(" train" in situation for each in ways.values() for situation in each)


def test_a_state_of_another_run_is_refused(job, tmp_path):
    train(job(dynamic(), folder=tmp_path, epochs=1))
    with pytest.raises(UsageError, match="steps_per_epoch"):
        train(job(dynamic(), folder=tmp_path, batch_size=8))
    with pytest.raises(UsageError, match="does not fit"):
        train(job(net(), folder=tmp_path))


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / STATE).write_bytes(b"half a fi")
    with pytest.raises(DysurgeryError, match="damaged"):
        read_state(tmp_path)
    write_state(tmp_path, {"step": 1})
    with open(tmp_path / STATE, "r+b") as file:
        file.truncate(200)
    with pytest.raises(DysurgeryError, match="damaged"):
        read_state(tmp_path)


def test_nothing_is_unpickled(tmp_path):
    torch.save({"format": 2, "x": Interrupted("a class")}, tmp_path / STATE)
    with pytest.raises(DysurgeryError):
        read_state(tmp_path)


def test_differences_name_what_differs():
    before = {"a": 1, "b": {"c": 2, "d": 3}, "gone": 4}
    now = {"a": 1, "b": {"c": 5, "d": 3}, "new": 6}
    assert differences(before, now) == ["b.c: 2 -> 5", "gone: 4 -> None", "new: None -> 6"]


DRIVER = """
import os, signal, stat, sys, torch
torch.set_num_threads(1)
from dysurgery import files
from dysurgery.train import finetune, load_recipe
from dysurgery.train.loop import Observer

out, where, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
class Kill(Observer):
    count = 0
    def on_step(self, step):
        Kill.count += step.phase == "dynamic"
        if where == "step" and Kill.count == at:
            os.kill(os.getpid(), signal.SIGKILL)
if where == "write":
    whole = files.os.fsync
    def half(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return whole(descriptor)
        Kill.count += 1
        if Kill.count >= at:
            os.ftruncate(descriptor, 100)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(descriptor)
    files.os.fsync = half
recipe = load_recipe("digits", {"pretrain.epochs": 1, "finetune.epochs": 3, "temperature.warmup": 2,
                                "finetune.ema_decay": 0.9, "augment.crop": "pad", "train_images": 320})
finetune(recipe=recipe, out=out, resume=os.path.exists(out + "/run.json"), save_seconds=0, observer=Kill())
"""


def drive(tmp_path, out, where="nowhere", at=0):
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(script), str(out), where, str(at)], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = drive(folder, folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize(
    ("where", "at"),
    [("step", 3), ("step", 8), ("write", 4), ("write", 40)],
    ids=["in the warmup and an epoch", "in the second epoch", "writing the first state", "writing a later state"],
)
def test_a_run_killed_by_sigkill_ends_bit_for_bit_as_one_that_was_not(tmp_path, undisturbed, where, at):
    out = tmp_path / "run"
    assert drive(tmp_path, out, where, at).returncode == -signal.SIGKILL
    resumed = drive(tmp_path, out)
    assert resumed.returncode == 0, resumed.stderr
    for phase in ("control", "dynamic"):
        left, right = (safetensors.torch.load_file(run / phase / "model.safetensors") for run in (out, undisturbed))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == sorted(
        path.name for path in undisturbed.iterdir()
    )
