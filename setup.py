"""Builds flexdit_ext: CMake compiles csrc/, setuptools packs it. torch is not needed to build."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ONEDNN = "libdnnl.so.3"


def requirements_root() -> Path:
    """The environment that holds the build requirements: pip's isolated one, or the current one."""
    import pybind11

    return Path(pybind11.__file__).resolve().parents[4]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One build folder per interpreter, kept between builds: a second `pip install` compiles only what changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *os.environ.get("FLEXDIT_CMAKE_ARGS", "").split(),
        ]
        environment = os.environ | {"FLEXDIT_ONEDNN_ROOT": str(requirements_root())}
        # Paths of a vanished isolated environment must not survive in the cache.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options]
        subprocess.run(configure, env=environment, check=True)
        subprocess.run(["cmake", "--build", str(build)], env=environment, check=True)
        self.carry_onednn(build, target)

    def carry_onednn(self, build: Path, target: Path) -> None:
        """oneDNN's library beside the module, which looks there first: a wheel needs no other package's files. An
        editable installation uses the environment's, where there is one."""
        if self.inplace and (Path(sys.prefix) / "lib" / ONEDNN).exists():
            return
        found = re.search(r"^ONEDNN_LIBRARY:\w+=(.+)$", (build / "CMakeCache.txt").read_text(), flags=re.MULTILINE)
        shutil.copy(found[1], target / ONEDNN)


setup(ext_modules=[Extension("flexdit_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
