import sys

import pytest

from dysurgery.errors import DysurgeryError, UsageError
from dysurgery.models import build
from dysurgery.source import Source


def test_a_factory_in_a_file_is_called_with_its_arguments(factory_file):
    built = build(f"{factory_file}:tiny", model_args={"width": 4})
    assert built.model.stem.out_channels == 4
    assert built.source == Source("file", f"{factory_file}:tiny", {"width": 4})
    assert (built.label, built.input_size) == ("tiny", (3, 224, 224))
    assert built.preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert not built.model.training
    assert build(f"{factory_file}:TinyNet", weights="random").label == "TinyNet"


def test_a_model_may_say_its_input_size(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\n"
        "class A(nn.Conv2d):\n    input_size = (1, 20, 24)\n    def __init__(self): super().__init__(1, 1, 1)\n"
        "class B(A):\n    input_size = 224\n"
        "    default_cfg = {'input_size': [1, 28, 28], 'mean': [0.1], 'std': [0.2]}\n"
    )
    assert build(f"{path}:A").input_size == (1, 20, 24)
    assert build(f"{path}:A", input_size=(1, 8, 8)).input_size == (1, 8, 8)
    built = build(f"{path}:B")
    assert built.input_size == (1, 28, 28)
    assert built.preprocessing["std"] == [0.2]


@pytest.mark.parametrize(
    ("text", "factory", "kind", "words"),
    [
        ("def build(): pass", "biuld", UsageError, r"'biuld' does not exist .*did you mean 'build'.*defines build"),
        ("import torch\nnet = torch.nn.ReLU()", "net", UsageError, "no function or class"),
        ("def build(n): pass", "build", UsageError, "missing a required argument: 'n'.*--model-arg"),
        ("def build(): return 3", "build", DysurgeryError, "returns a int, not a torch.nn.Module"),
        ("x = 1\ndef build(:", "build", DysurgeryError, r"net.py, line 2: SyntaxError: invalid syntax"),
        ("\nimport nothing_like_it", "build", DysurgeryError, r"net.py, line 2: ModuleNotFoundError.*nothing_like_it"),
        ("import sys\nsys.exit(3)", "build", DysurgeryError, r"net.py, line 2: SystemExit: 3"),
        (
            "def build():\n    import json\n    json.loads('{')",
            "build",
            DysurgeryError,
            r"net.py, line 3: JSONDecodeError",
        ),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(tmp_path, text, factory, kind, words):
    (tmp_path / "net.py").write_text(text)
    path = list(sys.path)
    with pytest.raises(kind, match=words):
        build(f"{tmp_path / 'net.py'}:{factory}")
    assert sys.path == path


def test_an_argument_that_a_factory_does_not_take_is_named(factory_file):
    with pytest.raises(UsageError, match=r"no argument 'widht' \(did you mean 'width'\?\); it takes width, classes"):
        build(f"{factory_file}:tiny", model_args={"widht": 4})


def test_a_file_has_no_pretrained_weights(factory_file):
    with pytest.raises(UsageError, match="leave out --weights"):
        build(f"{factory_file}:tiny", weights="pretrained")


def test_two_files_each_import_their_own_neighbour(tmp_path):
    for folder, size in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "layers.py").write_text(f"SIZE = {size}\n")
        (tmp_path / folder / "net.py").write_text(
            "from torch import nn\nimport layers\n"
            "def net(): return nn.Conv2d(1, 1, layers.SIZE)\n"
            "def late():\n    from layers import SIZE\n    return nn.Conv2d(1, 1, SIZE)\n"
        )
    for folder, size in (("a", 3), ("b", 5), ("a", 3)):
        for factory in ("net", "late"):
            assert build(f"{tmp_path / folder / 'net.py'}:{factory}").model.kernel_size == (size, size)


def test_an_edit_of_the_file_is_seen(factory_file):
    first = build(f"{factory_file}:TinyNet").model
    assert type(build(f"{factory_file}:TinyNet").model) is type(first)
    factory_file.write_text(factory_file.read_text().replace("width=8", "width=6"))
    assert build(f"{factory_file}:TinyNet").model.stem.out_channels == 6
