"""`make wheel`: sdist -> wheel of this Python, repaired for manylinux, checked; both end up in dist/.

The wheel carries all it needs. oneDNN's libdnnl.so.3 lies beside the module (setup.py puts it there, in every wheel):
the package onednn-cpu-gomp works only where pip puts its files into sys.prefix/lib. libgomp.so.1 lies there, too, under
its own name and not under one of auditwheel's making: a process that has torch's libgomp.so.1 goes on with that: there
is one pool of OpenMP threads, and one without torch needs nothing of the system's. The CUDA runtime is static.
cuBLASLt is looked for when the program runs.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 60 * 10**6
# What a manylinux system has, besides what the wheel carries.
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2",
                    "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # fmt: skip
CARRIED = {"libdnnl.so.3", "libgomp.so.1"}
MEMBERS = {"flexdit_ext/_C.pyi", "flexdit_ext/py.typed", "flexdit_ext/diffusion/__init__.py"}


def run(*command, **options) -> str:
    print("+", *command, flush=True)
    return subprocess.run(
        [str(part) for part in command], check=True, text=True, stdout=subprocess.PIPE, **options
    ).stdout


def tool(name: str) -> Path:
    """A program of the environment that runs this script."""
    return Path(sys.executable).with_name(name)


def build(folder: Path, cuda: str) -> Path:
    """dist/*.tar.gz, and a wheel made of that alone."""
    (ROOT / "dist").mkdir(exist_ok=True)
    for old in (ROOT / "dist").iterdir():
        old.unlink()
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", "dist", ".",
        cwd=ROOT)  # fmt: skip
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    options = f"-DFLEXDIT_CUDA={cuda} -DFLEXDIT_RELEASE=ON {os.environ.get('FLEXDIT_CMAKE_ARGS', '')}"
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, sdist,
        env=os.environ | {"FLEXDIT_CMAKE_ARGS": options})  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair(wheel: Path, folder: Path) -> Path:
    """Adds libgomp, lets every library look beside itself, strips, and lets auditwheel find the tag."""
    run(sys.executable, "-m", "wheel", "unpack", "--dest", folder / "unpacked", wheel)
    (content,) = (folder / "unpacked").iterdir()
    package = content / "flexdit_ext"
    (module,) = package.glob("_C.*.so")
    gomp = Path(re.search(r"libgomp\.so\.1 => (\S+)", run("ldd", module))[1]).resolve()
    shutil.copy(gomp, package / "libgomp.so.1")
    add_licenses(next(content.glob("*.dist-info")) / "licenses", gomp)
    for library in [module, *(package / name for name in CARRIED)]:
        run("strip", "--strip-unneeded", library)  # before patchelf, whose results strip may break
        run(tool("patchelf"), "--set-rpath", "$ORIGIN", library)
    (folder / "packed").mkdir()
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", folder / "packed", content)
    (packed,) = (folder / "packed").iterdir()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", ROOT / "dist", packed, env=environment)
    (repaired,) = (ROOT / "dist").glob("*.whl")
    return repaired


def add_licenses(folder: Path, gomp: Path) -> None:
    """Of the libraries that the wheel carries."""
    for name in ("LICENSE", "THIRD-PARTY-PROGRAMS"):
        (folder / "oneDNN").mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(sys.prefix, "share/doc/onednn", name), folder / "oneDNN" / name)
    notice = (
        f"libgomp.so.1 is {gomp.name} of GCC, https://gcc.gnu.org, unchanged but for its search path. It is under the "
        "GNU General Public License, version 3, with the GCC Runtime Library Exception, version 3.1, which allows "
        "programs under any terms to come with it: https://www.gnu.org/licenses/gcc-exception-3.1.html\n"
    )
    (folder / "libgomp.txt").write_text(notice)


def check(wheel: Path) -> None:
    """Exits with what is wrong."""
    problems = []
    if wheel.stat().st_size > MOST_BYTES:
        problems.append(f"it has {wheel.stat().st_size / 1e6:.1f} MB, {MOST_BYTES / 1e6:.0f} are allowed")
    if "manylinux" not in wheel.name:
        problems.append("its name has no manylinux tag")
    version = ast.literal_eval(re.search(r"__version__ = (.*)", (ROOT / "flexdit_ext/version.py").read_text())[1])
    if not wheel.name.startswith(f"flexdit_ext-{version}-cp{sys.version_info.major}{sys.version_info.minor}-"):
        problems.append(f"its name is not that of version {version} for this Python")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as temporary:
        names = set(archive.namelist())
        problems += [f"it has no {name}" for name in MEMBERS - names]
        for license in ("LICENSE", "oneDNN", "libgomp"):
            if not any(".dist-info/" in name and license in name for name in names):
                problems.append(f"it has no licence file {license}")
        unwanted = [name for name in names if not re.match(r"flexdit_ext(\.libs|-[^/]*\.dist-info)?/", name)]
        problems += [f"it has {name}" for name in unwanted]
        libraries = [name for name in names if re.search(r"\.so(\.\d+)*$", name)]
        problems += [f"it has no flexdit_ext/{name}" for name in CARRIED if f"flexdit_ext/{name}" not in names]
        for name in libraries:
            needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", archive.extract(name, temporary)))
            problems += [f"{name} needs {other}" for other in set(needed) - SYSTEM_LIBRARIES - CARRIED]
    if problems:
        sys.exit(f"{wheel.name}: " + "; ".join(sorted(problems)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", choices=("AUTO", "ON", "OFF"), default="AUTO", help="AUTO: where nvcc is found")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flexdit-wheel-") as temporary:
        folder = Path(temporary)
        wheel = repair(build(folder, arguments.cuda), folder)
    check(wheel)
    for path in sorted((ROOT / "dist").iterdir()):
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
