"""The part that is compiled; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "dysurgery.nn._native",
            ["dysurgery/nn/_native.c"],
            depends=["dysurgery/nn/_native.h", "dysurgery/nn/_winograd.h"],
            # Compiled for OpenMP, but not linked with it: the threads are those of torch, which brings its own.
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            libraries=["m"],
            py_limited_api=True,
            optional=True,  # without a C compiler the layers run on torch's operations
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
