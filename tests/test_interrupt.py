"""Ctrl-C: a signal whose handler raises ends a kernel's work within a second.

An alarm stands for it. What was under way is not returned, and the same call then gives what it
always did.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from cpu_stub import operations
from torch.utils._python_dispatch import TorchDispatchMode

import nowag_ext
from nowag_ext import hessian, ops
from nowag_ext.pipeline import statistics
from nowag_ext.pipeline.statistics import GroupStatistics

CPU = Path(__file__).resolve().parent.parent / "csrc" / "cpu"

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(),
    reason="Python handles signals on its main thread alone",
)

ALARM_AFTER, SOON = 0.1, 1.0  # seconds


class Interruption(Exception):
    pass


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Sets an alarm, after which Interruption is raised."""

    def ring(*_: Any) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def seconds_until_it_ends(alarm: Callable[[float], None], call: Callable[[], Any]) -> float:
    """How long after the alarm the call ends, which would take far longer."""
    alarm(ALARM_AFTER)
    begun = time.perf_counter()
    with pytest.raises(Interruption):
        call()
    return time.perf_counter() - begun - ALARM_AFTER


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Of 65536 entries, where the work of many a call is minutes.
ENTRIES = 65536


def assign_from_afar() -> None:
    """Every previous entry is the same one: nothing is near it, and a tile takes long."""
    codes = torch.zeros(4096, 16, dtype=torch.uint16)
    w, h, codebook = normal(4096, 128), torch.ones(128), normal(ENTRIES, 8)
    ops.kmeans_assign([w], [h], [codebook], [codes], [], 1.0, True)


def assign_exhaustively() -> None:
    codes = torch.zeros(4096, 16, dtype=torch.uint16)
    ops.kmeans_assign_exhaustive(normal(4096, 128), torch.ones(128), normal(ENTRIES, 8), codes)


def feed_back() -> None:
    codes = torch.zeros(16384, 16, dtype=torch.uint16)
    x, carried, factor = normal(16384, 128), torch.zeros(16384, 128), torch.eye(128)
    ops.kmeans_feedback(x, carried, factor, normal(ENTRIES, 8), codes)


def merge_costs() -> None:
    sums = torch.ones(ENTRIES, 9, dtype=torch.int64)
    ops.kmeans_merge_costs(sums, normal(ENTRIES, 4), 1.0, torch.zeros(10**6, dtype=torch.int64))


LONG: dict[str, Callable[[], Any]] = {
    "seeding": lambda: ops.kmeans_seed(
        [normal(1024, 2048)], [torch.ones(2048)], ENTRIES, 4, "kmeans++", 0
    ),
    "scalar codes": lambda: nowag_ext.vq_compress(normal(256, 256), torch.ones(256), d=1, bits=16),
    "assignment": assign_from_afar,
    "exhaustive assignment": assign_exhaustively,
    "feedback": feed_back,
    "merge costs": merge_costs,
}


@pytest.mark.parametrize("call", LONG.values(), ids=LONG.keys())
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_a_long_call(alarm: Callable[[float], None], threads: int, call: Callable[[], Any]) -> None:
    assert seconds_until_it_ends(alarm, call) < SOON


def test_ctrl_c(threads: int) -> None:
    """As it comes from a terminal; started in the background, Python ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(ALARM_AFTER, signal.raise_signal, [signal.SIGINT])
    begun = time.perf_counter()
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            LONG["seeding"]()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - begun < SOON


def test_the_handler_may_call_operations(threads: int) -> None:
    """In the midst of another's threads; here it does not raise."""
    w, h = normal(512, 64), torch.ones(64)

    def seed() -> torch.Tensor:
        return ops.kmeans_seed([w], [h], 1024, 4, "kmeans++", 0)

    right, ticks = seed(), []
    before = signal.signal(signal.SIGALRM, lambda *_: ticks.append(ops.kmeans_energy(w, h, 4)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        while len(ticks) < 5:
            assert_same_bits(seed(), right)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_work_on(alarm: Callable[[float], None], threads: int) -> None:
    """A signal ends what the main thread does, not what others do at the time."""
    w, h = normal(512, 64), torch.ones(64)
    right = ops.kmeans_seed([w], [h], 1024, 4, "kmeans++", 0)
    got: list[torch.Tensor] = []

    def work() -> None:
        begun = time.perf_counter()
        while time.perf_counter() - begun < 4 * ALARM_AFTER:
            got.append(ops.kmeans_seed([w], [h], 1024, 4, "kmeans++", 0))

    worker = threading.Thread(target=work)
    worker.start()
    assert seconds_until_it_ends(alarm, LONG["seeding"]) < SOON
    worker.join()
    assert len(got) > 0
    for codebook in got:
        assert_same_bits(codebook, right)


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_the_same_call_again(alarm: Callable[[float], None], threads: int) -> None:
    """In place: after a warm call that was ended codes and sums agree, as the next one needs."""
    w, h = normal(4096, 96), torch.ones(96)
    old, new = normal(2, 1024, 4)

    def start() -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.zeros(4096, 24, dtype=torch.uint16)
        sums = torch.zeros(1024, 9, dtype=torch.int64)
        ops.kmeans_assign([w], [h], [old], [codes], [sums], 2.0**30, False)
        return codes, sums

    def warm(codes: torch.Tensor, sums: torch.Tensor) -> None:
        ops.kmeans_assign([w], [h], [new], [codes], [sums], 2.0**30, True, [old])

    right = start()
    begun = time.perf_counter()
    warm(*right)
    takes = time.perf_counter() - begun
    codes, sums = start()
    alarm(takes / 4)
    with pytest.raises(Interruption):
        warm(codes, sums)
    warm(codes, sums)
    assert_same_bits(codes, right[0])
    assert_same_bits(sums, right[1])


# Multiplications and additions by the shapes of the operands.
_WORK: dict[str, Callable[..., int]] = {
    "mm": lambda a, b: a[0] * a[1] * b[1],
    "addmm": lambda _, a, b: a[0] * a[1] * b[1],
    "linalg_cholesky_ex": lambda a: a[0] ** 3 // 3,
    "linalg_solve_triangular": lambda a, b: a[0] ** 2 * b[1],
}


class _Longest(TorchDispatchMode):
    """The most of these that one of torch's operations does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in _WORK:
            work = _WORK[name](*(tuple(x.shape) for x in args if isinstance(x, torch.Tensor)))
            self.seen[name] = max(self.seen.get(name, 0), work)
        return func(*args, **(kwargs or {}))


def correct(W: torch.Tensor, x: torch.Tensor) -> None:
    seen = GroupStatistics(W.shape[1], W.device)
    residual = {"residual": x[:, : len(W)]}
    seen.add_pair(x + 1, x, residual, residual, all_summed=False)
    assert set(seen.corrections({"residual": W, "other": W})) == {"residual", "other"}


UNDER_A_HESSIAN: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "vq": lambda W, x, H: nowag_ext.vq_compress(
        W, H.diagonal().sqrt(), d=4, bits=1, hessian=H, codebook=torch.randn(16, 4)
    ),
    "prune": lambda W, x, H: nowag_ext.prune(W, H.diagonal().sqrt(), sparsity=0.5, hessian=H),
    "corrections": lambda W, x, H: correct(W, x),
}


@pytest.mark.parametrize("call", UNDER_A_HESSIAN.values(), ids=UNDER_A_HESSIAN.keys())
def test_torch_is_given_work_in_parts(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    """Signals are answered between calls only: none does all of a layer's products or factor."""
    rows, inputs = 600, 1100
    monkeypatch.setattr(hessian, "_AT_ONCE", 0)
    monkeypatch.setattr(statistics, "_PART", 100 * inputs**2)
    monkeypatch.setattr(statistics, "_SUM_ROWS", 256)
    x = normal(rows, inputs)
    H = x.T @ x / rows
    with _Longest() as longest:
        call(normal(rows, inputs, seed=1), x, H)
    assert longest.seen.keys() >= {"linalg_cholesky_ex", "linalg_solve_triangular"}
    assert max(longest.seen.values()) <= rows * inputs * 512, longest.seen


def test_what_polling_throws_becomes_a_status() -> None:
    """Of every operation: a short call cannot be caught in the act by a signal."""
    found = re.findall(
        r"^Status (\w+)\([^{;]*\) (try )?\{\n(.*?)\n\}\n",
        "".join(source.read_text() for source in CPU.glob("*/*.cpp")),
        re.MULTILINE | re.DOTALL,
    )
    without = {name for name, _, body in found if not body.endswith("return failure();")}
    delegating = {"kmeans_assign", "kmeans_assign_exhaustive"}
    assert {name for name, _, _ in found} >= {*operations(), "kmeans_feedback", "assign"}
    assert without == {*delegating, "kmeans_update", "failure"}
