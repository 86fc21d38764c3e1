"""What ptxas says of the CUDA kernels for sm_90; a table of what each one takes.

Needs nvcc, not a GPU. Run with ``-s`` to see the table. A build with NOWAG_WERROR, as the `release`
preset's and `.ci/run`'s, refuses spills and local memory for each architecture it is for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*/*.cu"))
NVCC = shutil.which("nvcc")
REGISTERS_OF_A_MULTIPROCESSOR = 65536
# Threads of a block, for kernels whose registers must leave room for that many.
THREADS = {
    "vq_gemv_lut": 512,
    "vq_gemv_mma": 512,
    "vq_gemv_cluster": 512,
    "vq_gemv_prepare": 1024,
    "vq_gemv_finish": 512,
    "vq_gemv_decode": 512,
    "vq_dequantize_strips": 1024,  # two blocks
    "sparse_gemv_mma": 512,
    "kmeans_plus_plus": 640,
    "kmeans_largest_energy": 512,
    "kmeans_sum_energies": 512,
    "kmeans_scan_energies": 512,
    "kmeans_draw_": 512,
    "normalize_rows": 1024,
}

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
    pytest.mark.slow,
]


@dataclass
class Kernel:
    """One kernel as ptxas reports it."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int


def _ptxas(source: Path, folder: Path) -> str:
    command = [
        str(NVCC), "-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings",
        "-gencode=arch=compute_90,code=sm_90", f"-I{ROOT / 'csrc' / 'include'}",
        f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-c", str(source),
        "-o", str(folder / f"{source.stem}.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def parse(report: str) -> list[Kernel]:
    """The kernels of one or several reports of ptxas -v."""
    kernels = []
    for chunk in report.split("Compiling entry function ")[1:]:
        mangled, arch = re.match(r"'(\S+)' for '(\w+)'", chunk).groups()  # type: ignore[union-attr]
        kernels.append(
            Kernel(
                mangled,
                arch,
                _number(r"Used (\d+) registers", chunk),
                _number(r"(\d+) bytes stack frame", chunk),
                _number(r"(\d+) bytes spill stores", chunk)
                + _number(r"(\d+) bytes spill loads", chunk),
                _number(r"(\d+) bytes smem", chunk),
            )
        )
    return kernels


def _readable(names: list[str]) -> list[str]:
    filt = shutil.which("c++filt")
    if filt is None:
        return names
    text = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True).stdout
    short = [line.partition("(nowag::cuda::")[0] for line in text.splitlines()]
    return [re.sub(r"void nowag::cuda::|nowag::|\(DType\)", "", line)[:48] for line in short]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    folder = tmp_path_factory.mktemp("ptxas")
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda source: _ptxas(source, folder), SOURCES))
    found = [kernel for report in reports for kernel in parse(report)]
    for kernel, name in zip(found, _readable([kernel.name for kernel in found]), strict=True):
        kernel.name = name
    found.sort(key=lambda kernel: (kernel.name, kernel.arch))
    print(f"\n{'kernel':48} {'arch':6} registers stack spills")
    for kernel in found:
        print(
            f"{kernel.name:48} {kernel.arch:6} {kernel.registers:9} {kernel.stack:5} "
            f"{kernel.spills:6}"
        )
    return found


def test_parser_sees_spills() -> None:
    report = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1kv\n"
        "    24 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 1 barriers, 40 bytes smem\n"
    )
    assert parse(report) == [Kernel("_Z1kv", "sm_90", 32, 24, 24, 40)]


def test_no_spills_and_no_local_memory(kernels: list[Kernel]) -> None:
    assert {kernel.arch for kernel in kernels} == {"sm_90"}
    assert len(kernels) > 50
    bad = [kernel for kernel in kernels if kernel.stack or kernel.spills]
    assert not bad, f"kernels with local memory: {bad}"


def test_all_shared_memory_is_dynamic(kernels: list[Kernel]) -> None:
    """launch.h asks for all that a block can have, which beside static memory is refused."""
    static = [kernel for kernel in kernels if kernel.shared]
    assert not static, f"kernels with static shared memory: {static}"


def test_registers_leave_room_for_a_block(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        threads = next((n for name, n in THREADS.items() if name in kernel.name), 256)
        assert kernel.registers * threads <= REGISTERS_OF_A_MULTIPROCESSOR, kernel
