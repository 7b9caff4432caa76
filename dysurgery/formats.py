"""The kinds of file that a model is exported to: how each is written, and how it is run where it will run.

:mod:`dysurgery.export` is the one that calls. A new kind is a function that writes and one that opens, and an entry of
:data:`FORMATS`.
"""

import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from dysurgery.errors import DysurgeryError, sentence
from dysurgery.example import Example, call_arguments
from dysurgery.nn.execution import Chooser, choose_for_any_batch, choose_for_onnx

METADATA = "metadata.json"

_PROTOBUF_LIMIT = 2**31


class Traced(NamedTuple):
    """What a target writes."""

    program: ExportedProgram
    axes: tuple[dict[int, str], ...]
    """For each tensor that goes in the names of its open axes."""
    outputs: tuple[str, ...]
    metadata: dict[str, str]
    """Preprocessing and classes: name -> JSON."""
    opset: int | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that go in."""
        specs = self.program.graph_signature.input_specs
        return tuple(
            spec.arg.name
            for spec in specs
            if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
        )


def leaves(example: Example) -> list[Tensor]:
    """Return the tensors in an example, in order."""
    return [leaf for leaf in pytree.tree_leaves(call_arguments(example)) if isinstance(leaf, Tensor)]


@contextmanager
def failing(what: str, advice: str = "") -> Iterator[None]:
    """Silence warnings and logs in the block, and turn whatever is raised in it into one sentence."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (DysurgeryError, OSError):
        raise
    except Exception as error:
        raise DysurgeryError(f"the model cannot be {what}: {sentence(error)}{advice}") from error
    finally:
        logging.disable(disabled)


def _write_onnx(traced: Traced, file: IO[bytes]) -> int:
    """Write ONNX, with the weights inside; return its opset."""
    size = sum(t.numel() * t.element_size() for t in traced.program.state_dict.values())
    if size >= _PROTOBUF_LIMIT:
        raise DysurgeryError(f"an ONNX file holds 2 GB, and the weights are {size / 1e9:.1f} GB: use format 'pt2'")
    found = torch.onnx.export(
        traced.program,
        dynamo=True,
        verbose=False,
        dynamic_shapes=traced.axes,
        output_names=traced.outputs,
        opset_version=traced.opset,
    )
    assert found is not None
    opset: int = found.model.opset_imports[""]
    if traced.opset not in (None, opset):
        raise DysurgeryError(f"the model cannot be written in opset {traced.opset}: leave it out, or take {opset}")
    found.model.metadata_props.update(traced.metadata)
    file.write(found.model_proto.SerializeToString())
    return opset


def _session(path: Path) -> Any:
    """Open the file in onnxruntime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait for work at full speed would take the cores from torch, which is timed in turns.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run_onnx(path: Path, traced: Traced, checked: Sequence[Example]) -> list[list[Tensor]]:
    """Run the file in onnxruntime."""
    with failing("run by onnxruntime"):
        session = _session(path)
        taken = {given.name for given in session.get_inputs()}
        found = []
        for inputs in checked:
            named = zip(traced.inputs, leaves(inputs), strict=True)
            outputs = session.run(None, {name: tensor.numpy() for name, tensor in named if name in taken})
            found.append([torch.from_numpy(output) for output in outputs])
    return found


class _Session(nn.Module):
    """A file that onnxruntime runs, to be called like the model that it was."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = _session(path)
        self.names = [given.name for given in self.session.get_inputs()]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        named = zip(self.names, inputs, strict=True)
        found = self.session.run(None, {name: tensor.numpy() for name, tensor in named})
        return [torch.from_numpy(output) for output in found]


def _write_pt2(traced: Traced, file: IO[bytes]) -> None:
    """Write a program of torch.export."""
    values = {name: json.loads(value) for name, value in traced.metadata.items()}
    torch.export.save(traced.program, file, extra_files={METADATA: json.dumps(values)})


_RUN_PT2 = """
import sys, torch
from torch.utils import _pytree as pytree
file, inputs, outputs = sys.argv[1:]
with open(file, "rb") as opened:
    model = torch.export.load(opened).module()
with torch.no_grad():
    found = [model(*args, **kwargs) for args, kwargs in torch.load(inputs, weights_only=False)]
torch.save([[leaf for leaf in pytree.tree_leaves(each) if isinstance(leaf, torch.Tensor)] for each in found], outputs)
"""


def _run_pt2(path: Path, traced: Traced, checked: Sequence[Example]) -> list[list[Tensor]]:
    """Run the file in a fresh process, which knows nothing but torch."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs", Path(folder) / "outputs"
        torch.save([call_arguments(each) for each in checked], inputs)
        command = [sys.executable, "-P", "-c", _RUN_PT2, str(path), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DysurgeryError(f"the file does not run in a process of its own: {reason}")
        found: list[list[Tensor]] = torch.load(outputs, weights_only=True)
    return found


class _Program(nn.Module):
    """A program of torch.export; its own module refuses :meth:`eval`."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.call = torch.export.load(path).module().forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)


class Format(NamedTuple):
    """How one kind of file is written and run."""

    write: Callable[[Traced, IO[bytes]], int | None]
    """Write it; return the opset, if it has one."""
    run: Callable[[Path, Traced, Sequence[Example]], list[list[Tensor]]]
    """Run it on each example; return the tensors that come out."""
    open: Callable[[Path], nn.Module]
    """Open it in this process, to be called with the tensors that go in."""
    runtime: str
    """What runs it, for tables."""
    chooser: Chooser
    dtypes: tuple[torch.dtype, ...]
    packages: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "onnx": Format(
        _write_onnx,
        _run_onnx,
        _Session,
        "onnxruntime",
        choose_for_onnx,
        (torch.float32, torch.float16),
        ("onnx", "onnxscript", "onnxruntime"),
    ),
    "pt2": Format(
        _write_pt2,
        _run_pt2,
        _Program,
        "torch.export",
        choose_for_any_batch,
        (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    ),
}
