"""csrc/tests/no_spills.py, through which `make cuda` compiles: what it lets pass and what it stops."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "csrc" / "tests" / "no_spills.py"


def ptxas(kernel: str, stores: int, loads: int) -> str:
    return (
        f"ptxas info    : Compiling entry function '{kernel}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {kernel}\n"
        f"    8 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 0 barriers\n"
    )


def compile_with(output: str, status: int = 0) -> subprocess.CompletedProcess:
    compiler = f"import sys; sys.stderr.write({output!r}); sys.exit({status})"
    return subprocess.run([sys.executable, SCRIPT, sys.executable, "-c", compiler], capture_output=True, text=True)


@pytest.mark.parametrize("stores, loads", [(16, 0), (0, 4), (424, 604)])
def test_spilling_kernel_is_named(stores, loads):
    quiet, loud = ptxas("_Z5quietN7flexdit8bfloat16E", 0, 0), ptxas("_Z4loudN7flexdit7float16E", stores, loads)
    result = compile_with(quiet + loud)
    assert result.returncode == 1
    assert f"{stores} bytes spill stores, {loads} bytes spill loads" in result.stderr
    assert "loud" in result.stderr and "quiet" not in result.stderr and "sm_90a" in result.stderr


def test_others_pass_and_compilers_keep_their_word():
    result = compile_with(ptxas("_Z6singlef", 16, 16) + ptxas("_Z4tidyN7flexdit8bfloat16E", 0, 0) + "a warning\n")
    assert result.returncode == 0 and result.stderr == "a warning\n"
    assert compile_with("error: expected a ';'\n", 2).returncode == 2


def test_statistics_that_are_not_understood_fail():
    output = ptxas("_Z4tidyN7flexdit8bfloat16E", 0, 0).replace("spill stores", "spilled")
    assert compile_with(output).returncode == 1
