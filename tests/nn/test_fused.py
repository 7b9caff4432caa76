"""The GPU kernels where there is no GPU: Triton's interpreter runs them, and its compiler builds them.

What the interpreter is for has to be known before Triton is imported, so the tests of all ways run once more, in a
process of their own.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dysurgery.nn.execution import WAYS, Geometry, covers

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="that runs here anyway")
TESTS = Path(__file__).with_name("test_execution.py")


def test_interpreted_they_pass_the_tests_of_every_way():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "fused", str(TESTS)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500, check=False,
        cwd=TESTS.parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(done.stdout.splitlines()[-1].split(" passed")[0].split()[-1]) >= 50


def test_without_a_gpu_or_the_interpreter_they_are_not_for_a_cpu():
    geometry = Geometry((6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert "fused" in WAYS
    assert not covers("fused", torch.empty(2, 4, 7, 7), geometry)


def _built(kernel, dtype, constants, **options):
    """Build a kernel of a Hopper GPU for tensors of this type."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    accumulator = "*fp64" if dtype == "fp64" else "*fp32"
    types = dict.fromkeys(("x", "pi", "bank", "bias_bank", "y", "gy"), f"*{dtype}") | {
        "gpi": accumulator,
        "gbank": accumulator,
    }
    names = inspect.signature(kernel.fn).parameters
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("taps", [1, 3])
def test_they_build_for_a_gpu_with_tensor_cores_and_fit_it(dtype, taps):
    from dysurgery.nn import fused

    x = torch.empty(0, dtype={"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[dtype])
    shape = (256, 256, taps, taps)
    cases = [
        (fused._convolve, {"BIAS": True, "GRADIENT": False}, fused.Block.of(196, 256, 256)),
        (fused._convolve, {"BIAS": False, "GRADIENT": True}, fused.Block.of(196, 256, 256)),
        (fused._kernel_gradients, {"PADDED": 4}, fused.Block.of(196, 256, 256, most=32)),
    ]
    for kernel, more, block in cases:
        constants = fused._constants(x, block, fused.Tiling("fused", 256, 8, shape, (1, 1), (0, 0), (1, 1), 1))
        built = _built(kernel, dtype, {"KERNELS": 4, **more, **constants}, num_warps=fused.WARPS[kernel])
        assert "mma" in built.asm["ptx"]
        assert built.metadata.shared <= 227 * 1024
