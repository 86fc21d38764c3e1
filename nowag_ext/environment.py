"""What this installation can do, and what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from dataclasses import dataclass, field

import torch

from nowag_ext import _cpu, ops
from nowag_ext.version import __version__


@dataclass(frozen=True)
class Environment:
    """Facts about an installation.

    Attributes:
        versions: name -> version, or why there is none.
        backends: backend -> what it runs on, or why it does not run.
        missing: one sentence each: what is missing and how to get it.
    """

    versions: dict[str, str]
    backends: dict[str, str]
    missing: list[str] = field(default_factory=list)


_LIBRARIES = ("torch", "transformers", "safetensors", "gguf", "numpy")


def describe_environment() -> Environment:
    """Looks at the versions, the compiled modules and the devices."""
    versions = {
        "nowag_ext": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
    }
    versions |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    missing: list[str] = []
    backends = {"cpu": _cpu_backend(missing), "cuda": _cuda_backend(missing)}
    return Environment(versions, backends, missing)


def _cpu_backend(missing: list[str]) -> str:
    level, best = _cpu.simd_level(), _cpu.simd_best()
    text = f"{level}, {torch.get_num_threads()} threads"
    if level != best:
        missing.append(
            f"The CPU kernels run at {level} because NOWAG_SIMD={os.environ.get('NOWAG_SIMD')}: "
            f"unset it for {best}."
        )
        text += f" (best here: {best})"
    elif level == "scalar":
        missing.append(
            "This CPU has none of the instruction sets that the fast kernels use (AVX2, AVX-512): "
            "they run scalar code."
        )
    return text


def _cuda_backend(missing: list[str]) -> str:
    built, device = _has_cuda_kernels(), torch.cuda.is_available()
    if not built:
        missing.append(_NOT_BUILT)
    if not device:
        missing.append(f"No CUDA device can be used, since {_why_no_device()}.")
    found = torch.cuda.get_device_name() if device else "no device"
    return f"kernels {'built' if built else 'not built'}, {found}"


_NOT_BUILT = (
    "nowag_ext was built without CUDA: install the CUDA toolkit (nvcc) and reinstall with "
    "NOWAG_CUDA=1 pip install ."
)


def _has_cuda_kernels() -> bool:
    return importlib.util.find_spec("nowag_ext._cuda") is not None


def _why_no_device() -> str:
    if torch.version.cuda is None:
        return "torch was built without CUDA: install a CUDA build of torch"
    return "torch finds no device: check the NVIDIA driver with nvidia-smi"


def named_device(name: str) -> torch.device:
    """The device of a name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    ``auto`` is the first CUDA device, if it runs this build's kernels, or else the CPU.

    Raises:
        ValueError: the name is another, or of a device that is not there or cannot be used.
    """
    if name == "cpu" or (
        name == "auto" and not (torch.cuda.is_available() and _has_cuda_kernels())
    ):
        return torch.device("cpu")
    if not re.fullmatch(r"auto|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}.")
    if not torch.cuda.is_available():
        raise ValueError(f"device {name} cannot be used, since {_why_no_device()}.")
    if not _has_cuda_kernels():
        raise ValueError(_NOT_BUILT)
    index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"there is no device {name}: torch finds {count}.")
    device = torch.device("cuda", index)
    try:
        ops.normalize(torch.ones(1, 1, device=device))
    except RuntimeError as error:  # of a device that the kernels are not for
        if name == "auto":
            return torch.device("cpu")
        raise ValueError(f"device {name} cannot be used: {error}") from None
    return device
