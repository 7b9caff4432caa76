import json

import pytest
from click.testing import CliRunner
from dysurgery.cli import main


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_cost_of_one_model_lists_every_convolution():
    result = run("cost", "resnet18", "--input-size", 3, 64, 64)
    assert result.exit_code == 0, result.output
    assert "layer4.1.conv2" in result.output
    assert "11.69M" in result.output


def test_cost_of_two_models_shows_their_difference():
    result = run("cost", "mobilenetv2_050", "mobilenetv2_100")
    assert result.exit_code == 0, result.output
    for text in ("1.969M", "3.505M", "97.13M", "300.8M", "+78.0%"):
        assert text in result.output


def test_json_has_the_exact_figures():
    data = json.loads(run("cost", "mobilenetv2_100", "--json", "-").stdout)
    assert data["models"][0]["params"] == 3_504_872
    assert data["models"][0]["mult_adds"]["total"] == 300_774_272


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_a_terminal_of_ordinary_width(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    output = run("plan", "mobilenetv2_050", "--input-size", 3, 64, 64).output
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output
