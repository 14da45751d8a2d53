"""Builds flexdit_ext: CMake compiles csrc/, setuptools packs it. torch is not needed to build."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


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


setup(ext_modules=[Extension("flexdit_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
