"""The kernel tests again at lower instruction sets: the level is fixed once a process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fresh_process import fresh_python

from nowag_ext import _cpu

LEVELS = ["scalar", "avx2", "avx512", "avx512vbmi"]
TESTS = Path(__file__).parent
BELOW_BEST = LEVELS[: LEVELS.index(_cpu.simd_best())]


def _run(arguments: list[str], level: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        **fresh_python(*arguments, NOWAG_SIMD=level), capture_output=True, check=False
    )


# Scalar code, which no x86-64 machine of today runs, has its turn in .ci/sanitize.
@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level in BELOW_BEST if level != "scalar"])
def test_kernels_at(level: str) -> None:
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "kernel and not slow"]
    result = _run([*arguments, str(TESTS)], level)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.parametrize("level", [*BELOW_BEST, _cpu.simd_best()])
def test_level_is_forced(level: str) -> None:
    result = _run(["-c", "from nowag_ext import _cpu; print(_cpu.simd_level())"], level)
    assert result.stdout.strip() == level, result.stderr


def test_unknown_level_is_refused() -> None:
    result = _run(["-c", "import nowag_ext.ops"], "sse9")
    assert result.returncode != 0
    assert "NOWAG_SIMD=sse9 is not an instruction set of this machine" in result.stderr
