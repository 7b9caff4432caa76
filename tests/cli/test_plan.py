import json
from pathlib import Path

import pytest
from tiny import write_pets


@pytest.fixture
def run(run, factory_file):
    """Run a command on the tiny network; return its result."""
    write_pets(Path("pets"))
    return lambda name, *args: run(name, f"{factory_file}:tiny", "--input-size", 3, 16, 16, *args)


def test_a_budget_is_kept_and_the_table_says_by_what(run):
    result = run("plan", "--budget-params", "1.5x", "--budget-mult-adds", "+20%")
    assert result.exit_code == 0, result.output
    for words in ("score", "left out by the budget", "a rule of shape", "parameters and", "the most there is"):
        assert words in result.output


def test_data_give_scores_and_the_file_goes_to_convert_and_finetune(run):
    data = ("--data", "pets", "--set", "finetune.workers=0")
    result = run("plan", *data, "--budget-params", "2x", "--json", "plan.json", "--k", 3)
    assert result.exit_code == 0, result.output
    assert "12 images, with the network's own predictions" in result.output
    plan = json.loads(Path("plan.json").read_text())
    assert plan["params"]["dynamic"] <= plan["choice"]["budget"]["params"] == 2 * plan["params"]["static"]
    wanted = {site["path"] for site in plan["sites"] if site["decision"] == "dynamic"}
    assert plan["choice"]["kept"] == pytest.approx(sum(s["score"] for s in plan["sites"] if s["path"] in wanted))

    result = run("convert", "--plan", "plan.json", "--out", "converted", "--json", "converted.json")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("converted.json").read_text())["params"] == plan["params"]

    quick = ("--set", "finetune.epochs=1", "--set", "finetune.batch_size=4", "--no-control", "--device", "cpu")
    result = run("finetune", "--plan", "plan.json", *data, *quick, "--out", "run")
    assert result.exit_code == 0, result.output
    assert set(json.loads(Path("run/dynamic/config.json").read_text())["layers"]) == wanted


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--budget-params", "1.01x"), "holds no site"),
        (("--budget-params", "3%"), "did you mean '+3%'"),
        (("--no-labels",), "say which"),
        (("--budget-params", "2x", "--data", "nowhere"), "no data 'nowhere'"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(run, args, words):
    result = run("plan", *args)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
