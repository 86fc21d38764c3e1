"""A CUDA device that there is not: tensors that say they are on it, and compute on the CPU.

As on a device, an operation whose operands are on two raises; what is copied from one to the other
says so (``.to``, ``copy_``). For tests of what is written for a device, where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended", 0)
_aten = torch.ops.aten
_COPIES = (_aten.copy_, _aten._to_copy)
# A device reads the indices from the host too, where what is indexed is its own.
_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)


class Pretended(Tensor):
    """A tensor that says that it is on DEVICE."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool | None = None) -> Any:
        if requires_grad is not None:  # a parameter, to accelerate, which makes them by their type
            return torch.nn.Parameter(inner, requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.inner})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        memo[id(self)] = made = _like(self, self.inner)
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        ours = [one for one in given if isinstance(one, Pretended)]
        _check_places(func, args, given)
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == DEVICE.type:
            kwargs = {**kwargs, "device": "cpu"}
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        stays = torch.device(target).type == DEVICE.type if target is not None else bool(ours)
        if func.overloadpacket is _aten.copy_:
            stays = isinstance(args[0], Pretended)
        known = {id(one.inner): one for one in ours}

        def outer(value: Any) -> Any:
            if not isinstance(value, Tensor) or not stays:
                return value
            same = known.get(id(value))
            return Pretended(value) if same is None else same

        return tree_map(outer, result)


def _check_places(func: Any, args: Any, given: list[Tensor]) -> None:
    if func.overloadpacket in _COPIES:
        return
    if func.overloadpacket in _INDEXED and isinstance(args[0], Pretended):
        given = [args[0], *(one for one in args[2:] if isinstance(one, Tensor))]
    strange = [one for one in given if not isinstance(one, Pretended) and one.dim() > 0]
    if strange:
        raise RuntimeError(f"{func}: operands on {DEVICE} and on {strange[0].device}")


# What torch makes on a device by itself: of a number that meets a tensor, say.
_MADE = torch.library.Library("aten", "IMPL")


def _empty(size: Any, *more: Any, **kwargs: Any) -> Tensor:
    return Pretended(torch.empty(size, dtype=kwargs.get("dtype"), device="cpu"))


for _name in ("empty.memory_format", "empty_strided"):
    _MADE.impl(_name, _empty, "PrivateUse1")


def _like(tensor: Tensor, inner: Tensor) -> Tensor:
    """A copy, a parameter if the tensor is one."""
    made: Tensor = Pretended(inner.detach().clone())
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def _is_device(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("pretended")


class _Factories(TorchFunctionMode):
    """What names the device without an operand on it: new tensors, and ``.to``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        places = [*args, *kwargs.values()]
        if not any(_is_device(value) for value in places) or func is torch.device:
            return func(*args, **kwargs)
        if any(isinstance(value, Pretended) for value in tree_flatten((args, kwargs))[0]):
            if name == "to":  # it is there
                rest = [value for value in args[1:] if not _is_device(value)]
                more = {key: value for key, value in kwargs.items() if key != "device"}
                return func(args[0], *rest, **more) if rest or more else args[0]
            return func(*args, **kwargs)
        args, kwargs = tree_map(_on_host, args), tree_map(_on_host, kwargs)
        result = func(*args, **kwargs)
        return tree_map(lambda one: _moved(one) if isinstance(one, Tensor) else one, result)


def _on_host(value: Any) -> Any:
    return torch.device("cpu") if _is_device(value) else value


def _moved(tensor: Tensor) -> Tensor:
    return Pretended(tensor.detach().clone())


def moved(model: Any) -> Any:
    """The model, its parameters and buffers on the device; a tensor that was shared stays so."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _like(tensor, tensor)
                kind[name] = made[id(tensor)]
    return model


@contextmanager
def pretended_device() -> Iterator[None]:
    """Within it tensors can be made on the device."""
    with _Factories():
        yield
