import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_examples_run_one_after_the_other(tmp_path):
    code = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pointwise True all-but-first" in done.stdout


@pytest.mark.slow
def test_every_command_runs_as_it_stands(tmp_path):
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("dysurgery ")]
    assert len(lines) > 10
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
    assert {"resnet18-dy4", "edited", "mobilenet_v3_small-dy4", "mine.toml"} <= {
        path.name for path in tmp_path.iterdir()
    }
