import json

import pytest
import timm
import torch
from tiny import image_data, net

import dysurgery
from dysurgery import DysurgeryError, UsageError
from dysurgery.train import Interrupted, Observer, finetune, load_recipe
from dysurgery.train.experiment import read_run

SHORT = {"pretrain.epochs": 2, "finetune.epochs": 2, "temperature.warmup": 1}


def digits(**overrides):
    return load_recipe("digits", {**SHORT, **{key.replace("__", "."): value for key, value in overrides.items()}})


def folder_recipe(**overrides):
    plain = {"finetune.epochs": 1, "finetune.batch_size": 16, "finetune.workers": 0, "augment.crop": "pad"}
    return load_recipe("folder", {**plain, **{key.replace("__", "."): value for key, value in overrides.items()}})


def test_the_digits_recipe_from_nothing_to_a_comparison():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    outcome = finetune(recipe=digits())
    assert torch.equal(torch.get_rng_state(), state)
    (seed,) = outcome.seeds
    assert seed.converted == seed.before
    assert seed.difference == seed.dynamic - seed.control
    assert outcome.costs[1].params > 3 * outcome.costs[0].params
    assert 0 < outcome.latency["static"] < outcome.latency["dynamic"] * 5
    assert {epoch.phase for epoch in outcome.history} == {"before", "control", "dynamic"}
    assert dysurgery.temperature(outcome.model) == 1.0
    json.dumps(outcome.to_json())


def test_the_model_that_was_given_stays_as_it_was():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcome = finetune(model, image_data(), folder_recipe())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert outcome.control is not model


def test_seeds_repeat_everything_and_give_mean_and_spread(tmp_path):
    outcome = finetune(recipe=digits(), seeds=(0, 1), out=tmp_path / "run")
    assert [seed.seed for seed in outcome.seeds] == [0, 1]
    values = outcome.values("dynamic")
    assert outcome.mean("dynamic") == pytest.approx(sum(values) / 2)
    assert outcome.spread("dynamic") == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert outcome.seeds[0].before != outcome.seeds[1].before
    assert (tmp_path / "run" / "seed-1" / "dynamic" / "model.safetensors").exists()
    with pytest.raises(UsageError, match="twice"):
        finetune(recipe=digits(), seeds=(1, 1))


def test_the_folder_of_a_run_holds_networks_history_and_curves(tmp_path):
    out = tmp_path / "run"
    outcome = finetune(recipe=digits(), out=out)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(dysurgery.load(out / "dynamic")(x), outcome.model(x))
    assert torch.equal(dysurgery.load(out / "control")(x), outcome.control(x))
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["before"] * 2 + ["control"] * 2 + ["dynamic"] * 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "result.json").read_text())["accuracy"]["dynamic"] == outcome.mean("dynamic")
    assert not list(out.glob("*-state"))
    with pytest.raises(UsageError, match=r"holds a run already.*--resume"):
        finetune(recipe=digits(), out=out)
    again = finetune(recipe=digits(), out=out, resume=True)  # finished: nothing is trained again
    assert again.mean("dynamic") == outcome.mean("dynamic")
    assert [epoch.seconds for epoch in again.history] == [epoch.seconds for epoch in outcome.history]


def test_a_run_that_was_stopped_goes_on_in_the_phase_it_was_in(tmp_path):
    class Count(Observer):
        steps = 0

        def on_step(self, step):
            self.steps += 1

    whole, part, rest = Count(), Count(), Count()
    expected = finetune(recipe=digits(), observer=whole)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        finetune(recipe=digits(), out=out, observer=part, asked_to_stop=lambda: part.steps >= 90)
    outcome = finetune(recipe=digits(), out=out, resume=True, observer=rest)
    assert part.steps + rest.steps == whole.steps
    assert outcome.seeds[0].dynamic == expected.seeds[0].dynamic
    assert len(outcome.history) == len(expected.history)


def test_another_recipe_data_model_or_seed_is_refused_with_what_differs(tmp_path):
    out = tmp_path / "run"
    finetune(net(), image_data(), folder_recipe(), out=out, control=False)
    for arguments, words in (
        ((net(), image_data(), folder_recipe(finetune__lr=0.5)), r"recipe.finetune.lr: 0.01 -> 0.5"),
        ((net(), image_data(train=32), folder_recipe()), r"images: \[48, 20\] -> \[32, 20\]"),
        ((net(dropout=0.1), image_data(), folder_recipe(seed=3)), "recipe.seed: 0 -> 3"),
    ):
        with pytest.raises(UsageError, match=words):
            finetune(*arguments, out=out, resume=True, control=False)
    other = net()
    with torch.no_grad():
        other.fc.bias += 1
    with pytest.raises(UsageError, match="sha256"):
        finetune(other, image_data(), folder_recipe(), out=out, resume=True, control=False)
    with pytest.raises(UsageError, match="control"):
        finetune(net(), image_data(), folder_recipe(), out=out, resume=True)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("dear diary")
    with pytest.raises(UsageError, match="in the way"):
        finetune(net(), image_data(), folder_recipe(), out=tmp_path)
    with pytest.raises(UsageError, match="no run to resume"):
        finetune(net(), image_data(), folder_recipe(), out=tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(DysurgeryError, match="damaged"):
        read_run(tmp_path / "run")


def test_a_pretrained_network_gets_a_head_for_the_data_and_loads_again(tmp_path):
    model = timm.create_model("mobilenetv3_small_050")
    data = image_data()
    outcome = finetune(model, data, folder_recipe(), out=tmp_path / "run")
    assert outcome.model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert any("fresh head" in note for note in outcome.notes)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(dysurgery.load(tmp_path / "run" / "dynamic")(x), outcome.model(x))


def test_a_dynamic_network_is_trained_without_a_control(tmp_path):
    dynamic = dysurgery.convert(net().eval(), torch.randn(1, 3, 8, 8))
    outcome = finetune(dynamic, image_data(), folder_recipe())
    assert outcome.control is None
    assert outcome.seeds[0].difference is None
    assert outcome.costs[0] is None
    with pytest.raises(UsageError, match="--no-control"):
        finetune(dynamic, image_data(), folder_recipe(), control=True)


def test_the_control_sees_the_same_recipe_and_learns_nothing_from_being_first():
    with_control = finetune(net(), image_data(), folder_recipe())
    without = finetune(net(), image_data(), folder_recipe(), control=False)
    assert without.seeds[0].dynamic == with_control.seeds[0].dynamic
    last = {epoch.phase: epoch for epoch in with_control.history}
    assert last["control"].tau is None
    assert last["dynamic"].entropy is not None


def test_calibration_is_on_by_default_and_can_be_turned_off():
    spread = [
        finetune(
            net(), image_data(), folder_recipe(surgery__calibrate=std, finetune__lr=0.0, temperature__warmup=0)
        ).history[-1].spread
        for std in (1.5, 0.0)
    ]  # fmt: skip
    assert spread[0] > 5 * spread[1]
    outcome = finetune(net(), image_data(), folder_recipe(surgery__start="zero-sum"))
    assert any("not calibrated" in note for note in outcome.notes)


def test_distillation_through_a_recipe_teaches_both_networks():
    outcome = finetune(net(), image_data(), folder_recipe(distill__weight=1.0, distill__labels=False))
    assert outcome.seeds[0].dynamic is not None
    with pytest.raises(UsageError, match="cannot teach"):
        finetune(net(classes=5), image_data(), folder_recipe(distill__weight=1.0))


def test_what_is_missing_is_named():
    with pytest.raises(UsageError, match="names no model"):
        finetune(data="digits", recipe="folder")
    with pytest.raises(UsageError, match="names no data"):
        finetune(net(), recipe="folder")
    with pytest.raises(UsageError, match="no device"):
        finetune(net(), image_data(), folder_recipe(), device="gpu")


def test_on_a_cpu_ways_are_not_measured_for_a_compiled_network(tmp_path):
    with pytest.raises(UsageError, match=r"on a CPU .* autotune or compile, not both"):
        finetune(recipe=digits(finetune__autotune=True, finetune__compile=True), device="cpu", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_where_only_dynamic_layers_train_the_control_trains_those_that_became_dynamic():
    outcome = finetune(recipe=digits(finetune__train="dynamic", finetune__epochs=1))
    start = finetune(recipe=digits(finetune__train="dynamic", finetune__epochs=1, finetune__lr=0.0)).control
    dynamic = {path for path, layer in outcome.model.named_modules() if isinstance(layer, dysurgery.nn.DynamicLayer)}
    moved = {
        name.rpartition(".")[0]
        for (name, after), before in zip(outcome.control.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(after, before)
    }
    assert moved == dynamic


def test_where_only_the_attention_trains_there_is_no_control():
    outcome = finetune(recipe=digits(finetune__train="attention", finetune__epochs=1))
    assert outcome.control is None
    with pytest.raises(UsageError, match="--no-control"):
        finetune(recipe=digits(finetune__train="attention"), control=True)


def test_a_fresh_head_is_not_left_untrained():
    with pytest.raises(UsageError, match="fresh head for 3 classes"):
        finetune(net(classes=5), image_data(), folder_recipe(finetune__train="dynamic"))
