from click.testing import CliRunner
from dysurgery.cli import main
from dysurgery.cli.options import KeyValue

from dysurgery.train import load_recipe, recipe_names


def run(*args):
    return CliRunner().invoke(main, ["recipes", *args])


def test_ls_names_every_recipe_with_its_description():
    result = run("ls")
    assert result.exit_code == 0
    assert all(name in result.output for name in recipe_names())
    assert "handwritten digits" in result.output


def test_cat_prints_a_recipe_that_is_one(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(run("cat", "folder").output)
    assert load_recipe(str(path)).finetune == load_recipe("folder").finetune


def test_cp_copies_once_and_never_over_something(tmp_path):
    path = tmp_path / "mine.toml"
    assert run("cp", "digits", str(path)).exit_code == 0
    assert run("validate", str(path)).exit_code == 0
    path.write_text("changed")
    again = run("cp", "digits", str(path))
    assert again.exit_code == 1
    assert "exists already" in again.output
    assert path.read_text() == "changed"
    assert run("cp", "digits", str(tmp_path)).exit_code == 0
    assert (tmp_path / "digits.toml").exists()
    assert "ends in .toml" in run("cp", "digits", str(tmp_path / "x.txt")).output


def test_validate_names_the_unknown_key_and_the_nearest(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[finetune]\nepoch = 3\n")
    result = run("validate", str(path))
    assert result.exit_code == 2
    assert "'epoch' in [finetune]" in result.output
    assert "did you mean 'epochs'" in result.output
    assert run("validate", str(tmp_path / "none.toml")).exit_code == 1


def test_values_on_the_command_line_may_be_written_as_in_toml():
    convert = KeyValue().convert
    for text, value in (("true", True), ("False", False), ("[1, 2]", [1, 2]), ("0.5", 0.5), ("rand-m9", "rand-m9")):
        assert convert(f"finetune.x={text}", None, None) == ("finetune.x", value)


def test_an_unknown_recipe_is_named():
    result = run("cat", "digit")
    assert result.exit_code == 2
    assert "did you mean 'digits'" in result.output
