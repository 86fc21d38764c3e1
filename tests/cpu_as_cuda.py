"""Lets what is written for a CUDA device run on the CPU: every tensor stays there, graphs replay
nothing, events tell the CPU's time. For tests of programs that a machine without a GPU has too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = "NVIDIA H100 80GB HBM3"


class _OnCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.cuda:
            return args[0]
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **kwargs)


def _on_cpu(value: Any) -> Any:
    named = isinstance(value, torch.device | str) and str(value).startswith("cuda")
    return torch.device("cpu") if named else value


class _Event:
    def __init__(self, **_: Any) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.time - self.time) + 1e-3


class _Stream:
    def wait_stream(self, _: _Stream) -> None:
        pass


class _Graph:
    def replay(self) -> None:
        pass


@contextmanager
def cpu_as_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "Event": _Event, "Stream": _Stream, "CUDAGraph": _Graph, "current_stream": _Stream,
        "stream": nullcontext, "graph": nullcontext, "synchronize": lambda: None,
        "_sleep": lambda _: None, "empty_cache": lambda: None, "memory_allocated": lambda: 2**30,
        "get_device_name": lambda: DEVICE, "get_device_capability": lambda: (9, 0),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda: None)
    with _OnCpu():
        yield
