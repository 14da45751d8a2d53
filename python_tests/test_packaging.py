"""packaging/build_wheel.py's check: what it lets pass and what it stops. CI builds a real wheel and installs it."""

import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest

from flexdit_ext import __version__

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("build_wheel", ROOT / "packaging/build_wheel.py")
build_wheel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_wheel)

INFO = f"flexdit_ext-{__version__}.dist-info"
LICENSES = [f"{INFO}/licenses/{name}" for name in ("LICENSE", "oneDNN/LICENSE", "libgomp.txt")]
FILES = [*build_wheel.MEMBERS, *LICENSES, "flexdit_ext/_C.so", "flexdit_ext/libdnnl.so.3", "flexdit_ext/libgomp.so.1"]
NEEDED = [*build_wheel.MEMBERS, *FILES[-2:]]
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
NAME = f"flexdit_ext-{__version__}-{TAG}-{TAG}-manylinux_2_34_x86_64.whl"


def problems(path: Path, monkeypatch, files=FILES, name=NAME, needs=("libc.so.6", "libdnnl.so.3")) -> str:
    with zipfile.ZipFile(path / name, "w") as archive:
        for file in files:
            archive.writestr(file, "")
    monkeypatch.setattr(
        build_wheel, "run", lambda *_: "".join(f" 0x1 (NEEDED)  Shared library: [{n}]\n" for n in needs)
    )
    try:
        build_wheel.check(path / name)
    except SystemExit as error:
        return str(error)
    return ""


@pytest.mark.parametrize("change, message", [
    ({}, ""),
    ({"name": NAME.replace("manylinux_2_34", "linux")}, "its name has no manylinux tag"),
    ({"name": NAME.replace(__version__, "9.9.9")}, f"its name is not that of version {__version__}"),
    ({"files": [*FILES, "python_tests/test_ops.py"]}, "it has python_tests/test_ops.py"),
    ({"files": [*FILES, "flexdit_ext.libs/libgomp-1234.so"]}, ""),
    ({"needs": ["libcudart.so.13"]}, "flexdit_ext/_C.so needs libcudart.so.13"),
    ({"needs": ["libcublasLt.so.13", "libm.so.6"]}, "needs libcublasLt.so.13"),
    *(({"files": [f for f in FILES if f != gone]}, f"it has no {gone}") for gone in sorted(NEEDED)),
    *(({"files": [f for f in FILES if f != gone]}, "it has no licence file") for gone in LICENSES[1:]),
])  # fmt: skip
def test_check(change, message, tmp_path, monkeypatch):
    found = problems(tmp_path, monkeypatch, **change)
    assert message in found if message else found == ""


def test_size(tmp_path, monkeypatch):
    monkeypatch.setattr(build_wheel, "MOST_BYTES", 1000)
    assert "MB, 0 are allowed" in problems(tmp_path, monkeypatch)
