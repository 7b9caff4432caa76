import pytest
from click.testing import CliRunner
from dysurgery.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command line in an empty folder; return its result."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])
