import json

import pytest

from dysurgery import UsageError
from dysurgery.errors import DysurgeryError
from dysurgery.train import load_recipe, recipe_names
from dysurgery.train.recipe import recipe_from


def test_every_installed_recipe_is_valid():
    assert "digits" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).name == name


@pytest.mark.parametrize("name", ["imagenet-mobilenetv2", "imagenet-mobilenetv3-small", "imagenet-resnet18"])
def test_the_papers_recipes_anneal_tau_from_30_to_1_in_10_epochs(name):
    temperature = load_recipe(name).temperature
    assert [temperature(epoch) for epoch in (0, 5, 10, 100)] == [30, 15.5, 1, 1]


@pytest.mark.parametrize("name", ["digits", "folder", "cifar10-resnet20"])
def test_a_calibrated_attention_starts_at_tau_1_and_a_warmup_is_one_option(name):
    assert load_recipe(name).temperature(0) == 1
    annealed = load_recipe(name, {"temperature.start": 30}).temperature
    assert [annealed(0), annealed(10)] == [30, 1]


def test_overrides_replace_values_and_only_those():
    plain, changed = load_recipe("digits"), load_recipe("digits", {"finetune.lr": 1, "seed": 5})
    assert changed.finetune.lr == 1.0
    assert changed.seed == 5
    assert changed.finetune.epochs == plain.finetune.epochs
    assert changed.pretrain == plain.pretrain


def test_a_recipe_is_also_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[finetune]\nepochs = 3\n")
    assert load_recipe(str(path)).finetune.epochs == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[finetun]\nepochs = 3", ["finetun", "did you mean 'finetune'"]),
        ("[finetune]\nepoch = 3", ["epoch", "[finetune]", "did you mean 'epochs'"]),
        ("[finetune]\nepochs = 'three'", ["epochs", "int", "three"]),
        ("[finetune]\nepochs = true", ["epochs", "int"]),
        ("[finetune]\nepochs = 0", ["at least 1"]),
        ("[finetune]\nlr = nan", ["lr"]),
        ("finetune = 3", ["section"]),
        ("data = 3", ["data", "str"]),
        ("[augment]\ncrop = 'rcc'", ["rcc", "did you mean 'rrc'", "[augment]"]),
        ("[augment]\nhflip = 2", ["hflip", "probability"]),
        ("[augment]\nscale = [0.1]", ["scale", "pair"]),
        ("[finetune]\nmilestones = ['a']", ["milestones", "list of numbers"]),
        ("[finetune]\nsched = 'plateau'", ["sched_on = 'epoch'"]),
        ("[finetune]\nwarmup_epochs = 20", ["warmup_epochs is below epochs"]),
        ("[distill]\nlabel = false", ["did you mean 'labels'"]),
        ("[surgery]\nstart = 'copy'", ["did you mean 'copies'"]),
        ("[pretrain]\namp = 'fp32'", ["amp", "bf16"]),
        ("[temperature]\nshape = 'square'", ["square", "linear"]),
        ("[finetune", ["TOML"]),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_the_way_out(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_recipe_is_an_error_with_near_names():
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        load_recipe("digit")
    with pytest.raises(DysurgeryError, match="nowhere"):
        load_recipe("nowhere.toml")


def test_a_recipe_comes_back_from_its_plain_values():
    for name in recipe_names():
        recipe = load_recipe(name)
        values = json.loads(json.dumps(recipe.to_json()))
        values.pop("name")
        assert recipe_from(values, name) == recipe


def test_sections_may_be_absent():
    recipe = load_recipe("folder")
    assert recipe.pretrain is None
    assert recipe.distill is None
    assert load_recipe("folder", {"distill.weight": 2}).distill.weight == 2.0


def test_tau_moves_per_step_or_per_epoch():
    assert load_recipe("digits").temperature.per == "step"
    assert load_recipe("digits", {"temperature.per": "epoch"}).temperature.per == "epoch"
