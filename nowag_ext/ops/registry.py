"""Operations under ``torch.ops.nowag``, and the compiled module that runs them on a device."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nowag_ext import _cpu

if TYPE_CHECKING:
    from nowag_ext._cpu import Kernels

_cuda: Any
try:
    from nowag_ext import _cuda  # type: ignore[no-redef]
except ImportError:
    _cuda = None

LIBRARY = torch.library.Library("nowag", "DEF")


def operation(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Defines ``nowag::<schema>`` with one implementation for both backends, and its fake."""

    def register(implementation: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        LIBRARY.define(schema)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, implementation, key)
        torch.library.register_fake(f"nowag::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.nowag, name).default

    return register


def _bits(*keys: str) -> int:
    sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in keys)
    return functools.reduce(int.__or__, (one.raw_repr() for one in sets))


# What torch's dispatcher finds of a dense tensor with storage, on a device that has kernels.
_PLAIN = _bits(
    "CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA"
)


def needs_dispatcher(x: Tensor) -> bool:
    """Whether somebody awaits calls with ``x`` at torch's dispatcher, or it has work to do on it.

    Transforms, modes, tracers, profilers, subclasses; negated views, tensors that are sparse or
    without storage, devices without kernels. Where there are none, calling an operation's
    implementation gives the same for less: dispatching takes longer than a small layer's kernel.
    """
    return (
        type(x) is not Tensor
        or torch._C._dispatch_keys(x).raw_repr() & ~_PLAIN != 0
        or is_transformed()
        or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def is_transformed() -> bool:
    """Whether calls may be differentiated forwards, or mapped, which no operand tells."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_in_fork = False


def _note_fork() -> None:
    global _in_fork
    _in_fork = True


os.register_at_fork(after_in_child=_note_fork)


def cpu_threads() -> int:
    """As many as torch uses; one in a forked process.

    OpenMP's threads do not outlive a fork, and a region that waits for them would wait for ever, as
    torch's own do. Processes that are spawned have all threads.
    """
    return 1 if _in_fork else torch.get_num_threads()


def backend_of(device: torch.device) -> tuple[Kernels, int]:
    """The compiled module for a device, and its last argument: threads, or the stream."""
    if device.type == "cpu":
        return _cpu, cpu_threads()
    if _cuda is None:
        raise RuntimeError(
            "nowag_ext was built without CUDA, so its kernels cannot run on "
            f"{device}: install the CUDA toolkit (nvcc) and reinstall with NOWAG_CUDA=1, or move "
            "the tensors to the CPU."
        )
    return _on_device(device.index or 0), torch.cuda.current_stream(device).cuda_stream


def backend_for(x: Tensor) -> tuple[Kernels, int]:
    """``backend_of`` the device of ``x``, for what is called for every token."""
    return (_cpu, cpu_threads()) if x.is_cpu else backend_of(x.device)


class KernelCall:
    """A CPU kernel with its arguments but for the threads, and the tensors that they point to."""

    def __init__(
        self, kernel: Callable[..., None], arguments: Sequence[Any], tensors: Sequence[Tensor]
    ) -> None:
        self._kernel, self._arguments = kernel, arguments
        # Apart from parameters, to which other memory may be given.
        self._tensors = [tensor.detach() for tensor in tensors]

    def __call__(self) -> None:
        self._kernel(*self._arguments, cpu_threads())


class _OnDevice:
    """The compiled CUDA module on one device: calls get scratch memory, in stream order."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)

    def __getattr__(self, name: str) -> Callable[..., None]:
        launch, workspace = getattr(_cuda, name), getattr(_cuda, f"{name}_workspace")

        def call(*arguments: Any) -> None:
            *operands, stream = arguments
            with torch.cuda.device(self._device):
                scratch_bytes = workspace(*operands)
                # Freed on return, as any tensor whose kernels are queued: torch hands the memory
                # out again to work that comes later in the same stream.
                scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=self._device)
                launch(*operands, scratch.data_ptr(), stream)

        setattr(self, name, call)
        return call


@functools.cache
def _on_device(index: int) -> _OnDevice:
    return _OnDevice(index)
