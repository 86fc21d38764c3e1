"""Builds the kernels with CMake and Ninja; torch is neither imported nor linked."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


class FreshBuildPy(build_py):
    """Starts from nothing: what an earlier build left of removed modules would get into wheels."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "nowag_ext", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures, builds and installs every compiled module in one CMake run."""

    def run(self) -> None:
        if not sys.platform.startswith("linux"):
            raise SystemExit(
                f"nowag_ext builds on Linux only (x86-64, or aarch64 with scalar kernels); "
                f"this is {platform.system()} {platform.machine()}."
            )
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        package_dir = (
            ROOT / "nowag_ext"
            if self.editable_mode
            else Path(self.build_lib).resolve() / "nowag_ext"
        )
        package_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('NOWAG_BUILD_TYPE', 'Release')}",
            # Named, because a build directory outlives the isolated environment that it was made
            # in: its cache would ask for that environment's ninja, which is gone.
            f"-DCMAKE_MAKE_PROGRAM={self._ninja()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DNOWAG_CUDA={os.environ.get('NOWAG_CUDA', 'auto')}",
            f"-DNOWAG_CUDA_ARCHS={os.environ.get('NOWAG_CUDA_ARCHS', '')}",
            f"-DNOWAG_WERROR={os.environ.get('NOWAG_WERROR', 'OFF')}",
            f"-DNOWAG_SANITIZE={os.environ.get('NOWAG_SANITIZE', '')}",
            f"-Dpybind11_DIR={self._pybind11_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        subprocess.run(
            ["cmake", "--install", str(build_dir), "--prefix", str(package_dir)], check=True
        )
        cuda = any(package_dir.glob("_cuda*.so"))
        print(
            "nowag_ext: built the CPU kernels "
            + ("and the CUDA kernels." if cuda else "alone: no nvcc was found, or wanted."),
            flush=True,
        )

    @staticmethod
    def _pybind11_cmake_dir() -> str:
        import pybind11

        return pybind11.get_cmake_dir()

    @staticmethod
    def _ninja() -> str:
        ninja = shutil.which("ninja")
        if ninja is None:
            raise SystemExit(
                "nowag_ext builds with ninja, and there is none on PATH: pip install ninja."
            )
        return ninja

    def get_outputs(self) -> list[str]:
        """setuptools asks which files were made; CMake alone knows whether CUDA is among them."""
        return [str(path) for path in (Path(self.build_lib) / "nowag_ext").glob("_c*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("nowag_ext._cpu", sources=[])],
    cmdclass={"build_py": FreshBuildPy, "build_ext": CMakeBuild},
)
