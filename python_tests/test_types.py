"""Type stubs against the compiled module, and what a type checker makes of a small program."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flexdit_ext
from flexdit_ext import _C

PACKAGE = Path(flexdit_ext.__file__).parent
STUB = ast.parse((PACKAGE / "_C.pyi").read_text())
# What Python and pybind11 add to every class.
COMMON = {*dir(object), "__module__", "__dict__", "__weakref__", "__annotations__", "__entries"}


def members(body) -> dict[str, list]:
    """Name -> its definitions; several where it is overloaded."""
    found = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.AnnAssign):
            found.setdefault(node.target.id, []).append(node)
    return found


def signatures(function) -> list[list[str]]:
    """Names of the parameters of each overload, from the docstring that pybind11 writes."""
    lines = re.findall(rf"^(?:\d+\. )?{function.__name__}(\(.*\)) -> .*$", function.__doc__, flags=re.MULTILINE)
    return stub_signatures(ast.parse(f"def f{line}: ...").body[0] for line in lines)


def stub_signatures(nodes) -> list[list[str]]:
    return [[a.arg for a in [*node.args.posonlyargs, *node.args.args]] for node in nodes]


def test_stub_has_the_modules_names():
    real = {name for name in dir(_C) if not name.startswith("__")}
    assert set(members(STUB.body)) - {"__all__"} == real


@pytest.mark.parametrize("name", [name for name in dir(_C) if inspect.isclass(getattr(_C, name))])
def test_stub_has_the_classes_members(name):
    (node,) = members(STUB.body)[name]
    stubbed, cls = members(node.body), getattr(_C, name)
    if issubclass(cls, Exception):
        return
    assert set(stubbed) - COMMON == {key for key in vars(cls) if key not in COMMON and "pybind11" not in key}
    for key, nodes in stubbed.items():
        method = vars(cls).get(key)
        if inspect.isfunction(method) or type(method).__name__ == "instancemethod":
            assert stub_signatures(nodes) == signatures(method), key


@pytest.mark.parametrize("name", [name for name in dir(_C) if inspect.isbuiltin(getattr(_C, name))])
def test_stub_has_the_functions_parameters(name):
    assert stub_signatures(members(STUB.body)[name]) == signatures(getattr(_C, name))


PROGRAM = """
import numpy as np
from flexdit_ext import DensitySchedule, FlexDiTConfig, Sampler, _C

config = FlexDiTConfig(input_size=16, schedule=DensitySchedule([(5, 5), (4, 4)]))
height, *width = config.density_schedule.grid(3)
sampler = Sampler.from_pretrained("folder", "bfloat16")
latents: np.ndarray = sampler.sample([1, 2], steps=4)
session = sampler.session(max_batch=2)
first: np.ndarray | None = session.take(session.add(label=1))
threads: int = _C.Execution(threads=2)  # wrong
sampler.sample([1], steps=2.5)  # wrong
DensitySchedule([(5, 5)]).grid("noise")  # wrong
"""


def test_type_checker(tmp_path):
    """torch's own types are left out: they take mypy ten seconds."""
    (tmp_path / "user.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n[mypy-flexdit_ext.*]\nignore_errors = True\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "--no-error-summary", "user.py"]
    # An editable installation is found by a hook, which mypy does not run.
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"MYPYPATH": str(PACKAGE.parent), "PATH": ""}
    )
    wrong = [i for i, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")]
    found = [int(line.split(":")[1]) for line in result.stdout.splitlines() if ": error:" in line]
    assert found == wrong, result.stdout + result.stderr
