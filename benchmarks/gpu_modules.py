"""Puts compiled modules into nowag_ext/ that run on the GPU of this machine.

    python benchmarks/gpu_modules.py modules.tar.gz

They are taken from NOWAG_PREBUILT (such an archive, or a folder), else from nowag_ext/ itself, if
they were built from these sources, load in this Python and launch a kernel on this device.
Otherwise CMake builds them, offline, for this device alone. What is in use is written to the
archive, so that a later run need not build.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nowag_ext"
BUILD = ROOT / "build" / "gpu"
STAMP = "sources.sha256"  # beside the modules in an archive, and in BUILD for those in nowag_ext/
NAMES = [f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_cpu", "_cuda")]
# That it imports is not enough: it may hold no code for this device.
CHECK = """
import torch
from nowag_ext import _cpu, _cuda, ops
ops.normalize(torch.ones(4, 4, device="cuda"))
torch.cuda.synchronize()
"""


def digest(root: Path = ROOT) -> str:
    """Of all that the modules are built from."""
    folders = [root / "csrc", root / "cmake"]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    total = hashlib.sha256()
    for path in sorted([*paths, root / "CMakeLists.txt"]):
        total.update(path.relative_to(root).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def load() -> bool:
    """Whether the modules in nowag_ext/ run here; says why not."""
    check = [sys.executable, "-c", CHECK]
    result = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        print("they do not run here:", *result.stderr.strip().splitlines()[-1:])
    return result.returncode == 0


def take(folder: Path, stamp: Path, where: str) -> bool:
    """Uses the modules of a folder, if they are of these sources, as far as known, and run here."""
    if not all((folder / name).is_file() for name in NAMES):
        print(f"{where}: no modules for this Python ({', '.join(NAMES)})")
        return False
    built_from = stamp.read_text().strip() if stamp.is_file() else ""
    if built_from not in ("", digest()):
        print(f"{where}: built from other sources")
        return False
    print(f"{where}: built from {'these' if built_from else 'unknown'} sources")
    if folder != PACKAGE:
        set_stamp("")
        for name in NAMES:
            shutil.copy2(folder / name, PACKAGE / name)
        set_stamp(built_from)
    return load()


def set_stamp(built_from: str) -> None:
    """Notes what the modules in nowag_ext/ were built from; nothing where that is not known."""
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / STAMP).unlink(missing_ok=True)
    if built_from:
        (BUILD / STAMP).write_text(built_from + "\n")


def prebuilt() -> bool:
    """Modules from NOWAG_PREBUILT or nowag_ext/, whichever comes first and runs."""
    given = os.environ.get("NOWAG_PREBUILT")
    if given and Path(given).is_dir():
        if take(Path(given), Path(given) / STAMP, given):
            return True
    elif given and Path(given).is_file():
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(given) as archive:
                # Releases of Python before its security fix of 2023 have no filters.
                archive.extraction_filter = getattr(tarfile, "data_filter", lambda one, _: one)
                archive.extractall(folder)
            if take(Path(folder), Path(folder) / STAMP, given):
                return True
    elif given:
        print(f"NOWAG_PREBUILT={given} is not there")
    return take(PACKAGE, BUILD / STAMP, "nowag_ext/")


def capability() -> str:
    """The device's compute capability as CMake takes it: 90 for 9.0."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return answer.split()[0].replace(".", "")


def build() -> bool:
    """Compiles for this device alone."""
    set_stamp("")
    generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", generator,
        "-DCMAKE_BUILD_TYPE=Release", "-DNOWAG_CUDA=1",
        f"-DNOWAG_CUDA_ARCHS={capability()}-real", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    subprocess.run(configure, check=True)
    jobs = str(os.cpu_count() or 1)
    subprocess.run(["cmake", "--build", str(BUILD), "--parallel", jobs], check=True)
    subprocess.run(["cmake", "--install", str(BUILD), "--prefix", str(PACKAGE)], check=True)
    set_stamp(digest())
    return load()


def pack(target: Path) -> None:
    """Writes the modules in use, without debug information, and what they were built from."""
    with tempfile.TemporaryDirectory() as folder:
        stamp = BUILD / STAMP
        files = [Path(shutil.copy2(PACKAGE / name, folder)) for name in NAMES]
        if strip := shutil.which("strip"):
            subprocess.run([strip, "--strip-debug", *files], check=True)
        partial = target.with_name(target.name + ".partial")
        with tarfile.open(partial, "w:gz") as archive:
            for path in [*files, *([stamp] if stamp.is_file() else [])]:
                archive.add(path, path.name)
        partial.replace(target)


def main() -> int:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/gpu_modules.py ARCHIVE")
    if not prebuilt() and not build():
        return 1
    pack(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
