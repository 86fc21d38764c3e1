"""Runs the CUDA kernels of csrc/cuda on the host SIMT executor (tests/simt), under ASan and UBSan.

``build()`` compiles the launchers, the executor and its driver once for the sources at hand, and
``Driver.run`` calls a launcher by name with the arguments of its contract in
``csrc/include/nowag``: numbers, tensors (written in place; one that comes twice is one buffer),
None for a null pointer, a list of problems, each a list of its fields, or a list of the words of an
array, tensors for addresses.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "simt"
SOURCES = sorted((ROOT / "tests" / "simt").glob("*.cpp")) + sorted(
    (ROOT / "csrc" / "cuda").glob("*/*.cu")
)
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-DNOWAG_SIMT", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-ffp-contract=off", "-Wall", "-Wextra",
    "-Wshadow", "-Werror", "-Wno-unknown-pragmas",
    *(f"-I{ROOT / folder}" for folder in ("csrc/include", "csrc", "tests/simt")),
]  # fmt: skip


def compiler() -> str | None:
    """The host compiler: $CXX, or g++."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _fingerprint() -> str:
    digest = hashlib.sha256(" ".join([compiler() or "", *FLAGS]).encode())
    for folder in ("csrc/include", "csrc/cuda", "tests/simt"):
        for path in sorted(path for path in (ROOT / folder).rglob("*") if path.is_file()):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(source: Path, folder: Path) -> Path:
    target = folder / f"{source.name}.o"
    command = [str(compiler()), *FLAGS, "-x", "c++", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@functools.cache
def build() -> Path:
    """The driver's executable for the sources as they are now."""
    executable = BUILD / _fingerprint() / "driver"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # of several pytest processes one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not executable.exists():
            for old in (path for path in BUILD.iterdir() if path.is_dir()):
                shutil.rmtree(old)
            _build_into(executable)
    return executable


def _build_into(executable: Path) -> None:
    executable.parent.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, executable.parent), SOURCES))
    link = [str(compiler()), "-fsanitize=address,undefined", *map(str, objects)]
    subprocess.run([*link, "-o", f"{executable}.partial"], check=True)
    Path(f"{executable}.partial").rename(executable)


class Fault(Exception):
    """The executor or a sanitizer ended the process; the message is what it said."""


class Driver:
    """One driver process, started again after a fault; ``environment``: of it alone."""

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, name: str, *arguments: Any, seed: int = 2) -> int:
        """Calls a launcher, which writes to the tensors among its arguments; returns its status."""
        tensors: list[torch.Tensor] = []
        packed = [_pack(argument, tensors) for argument in arguments]
        encoded = name.encode()
        request = struct.pack(f"=QI{len(encoded)}sI", seed, len(encoded), encoded, len(packed))
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request + b"".join(packed))
            process.stdin.flush()
        except BrokenPipeError:
            pass
        status = process.stdout.read(4)
        if len(status) < 4:
            self._process = None
            assert process.stderr is not None
            raise Fault(process.stderr.read().decode())
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            answer = bytearray(process.stdout.read(size))
            if size:
                bytes_view = torch.frombuffer(answer, dtype=torch.uint8)
                tensor.view(-1).view(torch.uint8).copy_(bytes_view)
        return int(struct.unpack("=i", status)[0])

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [build()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **self._environment},
            )
        return self._process


def _pack(argument: Any, tensors: list[torch.Tensor]) -> bytes:
    if argument is None:
        return b"n"
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous()
        for index, other in enumerate(tensors):
            if argument is other:
                return b"r" + struct.pack("=I", index)
        tensors.append(argument)
        flat = argument.reshape(-1).view(torch.uint8).numpy()
        return b"b" + struct.pack("=Q", flat.size) + flat.tobytes()
    if isinstance(argument, list | tuple):
        items = b"".join(_pack(item, tensors) for item in argument)
        return b"l" + struct.pack("=I", len(argument)) + items
    if isinstance(argument, float):
        return b"d" + struct.pack("=d", argument)
    return b"i" + struct.pack("=q", int(argument))
