"""Whoever watches or rewrites torch's calls sees those of layers that else spare the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nowag_ext import SparseLinear, VQLinear, ops, prune, vq_compress

WEIGHT, ACT_NORMS = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)), torch.ones(24)


def vq() -> nn.Module:
    return VQLinear.from_weight(vq_compress(WEIGHT, ACT_NORMS, d=2, bits=2, iters=5))


def sparse() -> nn.Module:
    return SparseLinear.from_weight(prune(WEIGHT, ACT_NORMS))


class FunctionMode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    __torch_dispatch__ = FunctionMode.__torch_function__


def by_mode(mode: type[FunctionMode | DispatchMode], layer: nn.Module, x: Tensor) -> list[str]:
    with mode() as watching:
        layer(x)
    return watching.seen


def by_profiler(layer: nn.Module, x: Tensor) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    return [event.key.replace("::", ".") for event in profile.key_averages()]


def by_tracing(layer: nn.Module, x: Tensor) -> list[str]:
    traced = torch.jit.trace(layer, (x,))
    assert_same_bits(traced(2 * x), layer(2 * x))
    return [str(node.kind()).replace("::", ".") for node in traced.inlined_graph.nodes()]


def by_make_fx(layer: nn.Module, x: Tensor) -> list[str]:
    traced = make_fx(layer)(x)
    assert_same_bits(traced(2 * x), layer(2 * x))
    return [str(node.target) for node in traced.graph.nodes]


def by_subclass(layer: nn.Module, x: Tensor) -> list[str]:
    seen = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    assert type(layer(x.as_subclass(Watched))) is Watched
    return seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "watch",
    [
        partial(by_mode, DispatchMode),
        partial(by_mode, FunctionMode),
        by_profiler,
        by_tracing,
        by_make_fx,
        by_subclass,
    ],
)
@pytest.mark.parametrize("make", [vq, sparse])
def test_calls_are_seen(
    make: Callable[[], nn.Module], watch: Callable[[nn.Module, Tensor], list[str]]
) -> None:
    layer, x = make(), torch.randn(3, 24)
    with torch.no_grad():
        assert any(f"nowag.{make.__name__}_linear" in name for name in watch(layer, x))


@pytest.mark.parametrize("make", [vq, sparse])
def test_negated_views_and_fake_tensors(make: Callable[[], nn.Module]) -> None:
    layer = make()
    with torch.no_grad():
        negated = torch.randn(3, 24, dtype=torch.complex64).conj().imag
        assert negated.is_neg()
        assert_same_bits(layer(negated), layer(negated.resolve_neg()))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            assert layer(torch.empty(2, 3, 24)).shape == (2, 3, 40)
        assert layer.to("meta")(torch.empty(3, 24, device="meta")).shape == (3, 40)


@pytest.mark.parametrize("make", [vq, sparse])
def test_tensors_without_storage_are_left_to_torch(make: Callable[[], nn.Module]) -> None:
    layer, x = make(), torch.randn(3, 24)
    with torch.no_grad():
        # Their addresses are 0.
        assert_same_bits(layer(torch._efficientzerotensor((3, 24))), layer(torch.zeros(3, 24)))
        functional = layer(torch._to_functional_tensor(x))
        assert_same_bits(torch._from_functional_tensor(functional), layer(x))
        for odd in (x.to_sparse(), x.to_mkldnn()):
            with pytest.raises(RuntimeError):  # or NotImplementedError, which is one
                layer(odd)


def test_a_plain_call_needs_no_dispatcher() -> None:
    x = torch.randn(3, 24)
    assert not ops.needs_dispatcher(x)
    with torch.inference_mode():
        assert not ops.needs_dispatcher(torch.randn(3, 24))
    assert ops.needs_dispatcher(nn.Parameter(x))
