import json

from click.testing import CliRunner
from dysurgery.cli import main

SHORT = ("--set", "pretrain.epochs=1", "--set", "finetune.epochs=1", "--set", "temperature.warmup=0.5")


def run(*args):
    return CliRunner().invoke(main, ["finetune", *args])


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


def test_mistakes_are_answered_by_one_sentence():
    for args, words in (
        (["--recipe", "digit"], "did you mean 'digits'"),
        (["--recipe", "digits", "--set", "finetune.epoch=1"], "did you mean 'epochs'"),
        (["--recipe", "digits", "--set", "finetune.epochs=x"], "int"),
        ([], "--recipe"),
    ):
        result = run(*args)
        assert result.exit_code == 2
        assert words in result.output
        assert "Traceback" not in result.output
