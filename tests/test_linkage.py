"""A file compiled for one instruction set holds nothing with external linkage but its table.

A function that several objects have with external linkage, such as an inline function or a template
of the standard library, is linked from one of them: from the AVX-512 one it crashes an older
machine. Code that runs when the module is loaded does so on any machine. Objects are compiled
without optimisation, so that no inlining hides a function.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
# The instruction sets as CMakeLists.txt names them.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {"avx2": AVX2, "avx512": AVX512, "avx512vbmi": [*AVX512, "-mavx512vbmi", "-mavx512vbmi2"]}
SOURCES = {
    source: flags
    for level, flags in LEVELS.items()
    for source in sorted(CPU.glob(f"*/*_{level}.cpp"))
}
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
NM = shutil.which("nm")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler ($CXX, or c++)"),
    pytest.mark.skipif(NM is None, reason="needs nm of binutils"),
    pytest.mark.skipif(
        platform.machine().lower() not in {"x86_64", "amd64"},
        reason="only x86-64 has files for one instruction set",
    ),
]


def _symbols(source: Path, flags: list[str], folder: Path) -> list[tuple[str, str]]:
    """(kind, name) of all that an unoptimised object of the source defines, as nm says it."""
    target = folder / f"{source.stem}.o"
    includes = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}"]
    command = [str(COMPILER), "-std=c++17", "-O0", "-fPIC", "-DNOWAG_X86=1", *flags, *includes]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = subprocess.run(
        [str(NM), "-C", "--defined-only", str(target)], capture_output=True, text=True, check=True
    )
    lines = [line.split(maxsplit=2) for line in table.stdout.splitlines()]
    return [(kind, name) for _, kind, name in lines]


def _violations(symbols: list[tuple[str, str]]) -> list[str]:
    """What the object shows to others beside its table, and what it runs when it is loaded."""
    shown = [
        f"{kind} {name}"
        for kind, name in symbols
        if (kind.isupper() or kind in "uvw") and not _is_table(kind, name)
    ]
    return shown + [f"{kind} {name}" for kind, name in symbols if "_GLOBAL__sub_I" in name]


def _is_table(kind: str, name: str) -> bool:
    """Whether it is constant data of the project named as a table of one instruction set."""
    return kind in "DR" and re.fullmatch(r"nowag::cpu::k\w+Avx(2|512|512Vbmi)", name) is not None


def test_objects_show_their_table_only(tmp_path: Path) -> None:
    assert len(SOURCES) >= 17
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda item: _symbols(*item, tmp_path), SOURCES.items()))
    for source, symbols in zip(SOURCES, objects, strict=True):
        name = source.relative_to(ROOT)
        found = _violations(symbols)
        assert not found, f"{name} holds more for others than its table: {found}"
        tables = [symbol for symbol in symbols if _is_table(*symbol)]
        assert len(tables) == 1, f"{name} must define one table, not {tables}"


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("inline int twice(int a) { return 2 * a; }\nint (*const at)(int) = twice;", "twice(int)"),
        ("struct S { int get() const { return 1; } };\nint a() { return S().get(); }", "S::get()"),
        ("template <int k> int t() { return k; }\nint a() { return t<1>(); }", "int t<1>()"),
        ("template <int k> int t = k;\nint a() { return t<1>; }", "t<1>"),
        ("#include <algorithm>\nint a(int b) { return std::max(b, 1); }", "std::max<int>"),
        ("#include <vector>\nint a() { return std::vector<int>(3)[0]; }", "std::vector<int"),
        ("static int f() { return 1; }\nint a = f();", "_GLOBAL__sub_I"),
    ],
)
def test_check_sees(code: str, shown: str, tmp_path: Path) -> None:
    source = tmp_path / "planted_avx2.cpp"
    source.write_text(code)
    assert shown in "\n".join(_violations(_symbols(source, AVX2, tmp_path)))
