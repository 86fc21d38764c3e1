"""The one list of operations (nowag/operations.h), and all that must have the same ones."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import cpu_stub
import pytest
import torch
from cpu_stub import INCLUDE, ROOT, operations

from nowag_ext import _cpu
from nowag_ext.ops import registry

CPU_ONLY = {
    "kmeans_assign_exhaustive",
    "tape_run",
    "simd_level",
    "simd_best",
    "vq_gemv_device_tokens",
}
COMPOSED = {"vq_linear", "vq_linear_grad", "sparse_linear", "sparse_linear_grad"}


def test_the_stub_is_what_the_module_says() -> None:
    assert cpu_stub.STUB.read_text() == cpu_stub.text(), (
        "nowag_ext/_cpu.pyi is not of this module: rebuild it, then run `python tests/cpu_stub.py`"
    )


def test_every_declared_operation_is_listed_with_its_stem() -> None:
    text = (INCLUDE / "operations.h").read_text()
    for each, macro in (("EACH", "NOWAG_DECLARE"), ("ALONE", "NOWAG_DECLARE_CPU")):
        listed = re.findall(rf"^    {each}\((\w+), (\w+)\)", text, re.MULTILINE)
        declared = {
            (header.stem, name)
            for header in INCLUDE.glob("*.h")
            for name in re.findall(rf"^{macro}\((\w+),", header.read_text(), re.MULTILINE)
        }
        assert set(listed) == declared
        assert len(listed) == len(declared)


def test_the_cpu_module_offers_the_list() -> None:
    assert set(cpu_stub.functions()) == {*operations(), *CPU_ONLY}


@pytest.mark.skipif(registry._cuda is None, reason="nowag_ext was built without CUDA")
def test_the_cuda_module_offers_the_list() -> None:
    offered = {name for name in vars(registry._cuda) if not name.startswith("_")}
    names = operations()
    assert offered == {*names, *(f"{name}_workspace" for name in names)}


@pytest.mark.parametrize(
    "source",
    ["csrc/bindings/cpu_module.cpp", "csrc/bindings/cuda_module.cpp", "tests/simt/driver.cpp"],
)
def test_the_list_is_taken_whole(source: str) -> None:
    """Without CUDA the last two cannot be asked."""
    assert "NOWAG_OPERATIONS(NOWAG_" in (ROOT / source).read_text()


def test_the_cpus_own_list_is_taken_whole() -> None:
    assert "NOWAG_CPU_OPERATIONS(NOWAG_" in (ROOT / "csrc/bindings/cpu_module.cpp").read_text()


def test_torch_has_an_op_for_each() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("nowag::") for name in names if name.startswith("nowag::")}
    assert registered == {*operations(), *COMPOSED}


def test_arguments_outside_the_contract_raise() -> None:
    with pytest.raises(ValueError, match="pack_codes: an argument is outside the contract"):
        _cpu.pack_codes(0, 0, 1, 4, 0, 1)
    with pytest.raises(ValueError, match="a problem has 9 fields, not 2"):
        _cpu.kmeans_energy([(1, 2)], 4, 0, 1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="kmeans_energy: an argument is outside the contract"):
        _cpu.kmeans_energy([(0,) * 9, (0,) * 9], 4, 0, 1)


# --- cmake/operations.cmake -----------------------------------------------------------------------


def configure(folder: Path) -> str:
    """The error of configuring a tree with our list and sources by name only, or ""."""
    for path in [*ROOT.glob("csrc/c*/*/*.c*"), *INCLUDE.glob("*.h")]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            copy.touch()
    listed = folder / "csrc" / "include" / "nowag" / "operations.h"
    if not listed.read_text():
        listed.write_text((INCLUDE / "operations.h").read_text())
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(names LANGUAGES NONE)\n"
        f"include({ROOT}/cmake/operations.cmake)\n"
    )
    done = subprocess.run(
        ["cmake", "-S", folder, "-B", folder / "build"], capture_output=True, text=True
    )
    return " ".join(done.stderr.split()) if done.returncode else ""


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


@needs_cmake
def test_the_build_takes_the_list(tmp_path: Path) -> None:
    assert configure(tmp_path) == ""


@needs_cmake
def test_the_build_refuses_a_file_of_no_operation(tmp_path: Path) -> None:
    stray = tmp_path / "csrc" / "cuda" / "vq" / "vq_scan.cu"
    stray.parent.mkdir(parents=True)
    stray.touch()
    assert f"{stray} belongs to no operation" in configure(tmp_path)


@needs_cmake
@pytest.mark.parametrize("missing", ["include/nowag", "cpu/lost", "cuda/lost"])
def test_the_build_refuses_an_operation_without_its_files(tmp_path: Path, missing: str) -> None:
    for name in ("include/nowag/lost_op.h", "cpu/lost/lost_op.cpp", "cuda/lost/lost_op.cu"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not name.startswith(missing):
            path.touch()
    text = (INCLUDE / "operations.h").read_text()
    listed = text.replace("    EACH(normalize,", "    EACH(lost_op, lost) \\\n    EACH(normalize,")
    (tmp_path / "csrc" / "include" / "nowag" / "operations.h").write_text(listed)
    assert f"names the stem lost_op, but there is no csrc/{missing}/lost_op." in configure(tmp_path)
