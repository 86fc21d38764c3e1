"""What this installation can do, and what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass, field

import torch

from nowag_ext import _cpu
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
    built = importlib.util.find_spec("nowag_ext._cuda") is not None
    device = torch.cuda.is_available()
    if not built:
        missing.append(
            "nowag_ext was built without CUDA: install the CUDA toolkit (nvcc) and reinstall with "
            "NOWAG_CUDA=1 pip install ."
        )
    if not device:
        why = (
            "torch was built without CUDA: install a CUDA build of torch"
            if torch.version.cuda is None
            else "torch finds no device: check the NVIDIA driver with nvidia-smi"
        )
        missing.append(f"No CUDA device can be used, since {why}.")
    found = torch.cuda.get_device_name() if device else "no device"
    return f"kernels {'built' if built else 'not built'}, {found}"
