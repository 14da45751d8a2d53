"""The C++ library and programs against it, for tests: built once per test session, or brought up to date."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import EMULATED_FOLDER

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "g++")


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def run(*command, **options) -> subprocess.CompletedProcess:
    """With torch's number of threads, and the output for the report where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run([str(one) for one in command], capture_output=True, text=True, env=environment, **options)
    assert "Sanitizer" not in result.stderr
    return result


def _succeed(*command) -> None:
    result = run(*command)
    assert result.returncode == 0, result.stdout + result.stderr


def _cache(folder: Path) -> dict[str, str]:
    """CMake's variables of a build folder, empty if there is none."""
    file = folder / "CMakeCache.txt"
    return dict(re.findall(r"^(\w+):\w+=(.*)$", file.read_text(), re.MULTILINE)) if file.exists() else {}


@functools.cache
def build_folder() -> Path:
    """Where libflexdit.a and libflexdit_c.so are: `make pytest` has built them, else it is done here, which takes a
    minute or two. Skips the test where there is no compiler."""
    if not shutil.which(COMPILER):
        pytest.skip(f"no C++ compiler: {COMPILER} was not found")
    folder = EMULATED_FOLDER
    if _cache(folder).get("FLEXDIT_C_API") != "ON" or _cache(folder)["FLEXDIT_CUDA"] != "OFF":
        folder = ROOT / "build" / "native"
        options = ["-DFLEXDIT_PYTHON=OFF", "-DFLEXDIT_CUDA=OFF", "-DFLEXDIT_C_API=ON"]
        options += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"]
        _succeed(_tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", *options)
    _succeed(_tool("cmake"), "--build", folder, "--target", "flexdit", "flexdit_c")
    return folder


def compile_program(source: Path, program: Path) -> None:
    """With the compiler alone, as a user without CMake would."""
    folder = build_folder()
    onednn = Path(_cache(folder)["ONEDNN_LIBRARY"])
    libraries = [folder / "libflexdit.a", onednn, f"-Wl,-rpath,{onednn.parent}"]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror", "-fopenmp"]
    _succeed(COMPILER, *flags, f"-I{ROOT}/csrc/include", source, *libraries, "-o", program)
