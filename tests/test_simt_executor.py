"""The SIMT executor itself: operations in correct use, and every fault it must catch."""

from __future__ import annotations

import pytest
import torch
from simt_host import Driver, Fault, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++ or $CXX)")
SEEDS = range(6)


def run(driver: Driver, name: str, seed: int) -> list[int]:
    out = torch.zeros(64, dtype=torch.int32)
    assert driver.run(name, out, seed=seed) == 0
    return out.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_barrier_orders_shared_memory(driver: Driver, seed: int) -> None:
    assert run(driver, "barrier", seed) == list(range(63, -1, -1))


@pytest.mark.parametrize("seed", SEEDS)
def test_operations(driver: Driver, seed: int) -> None:
    # Thread 33 is lane 1 of the second warp: lanes 0..31 are threads 32..63.
    assert run(driver, "operations", seed)[:16] == [
        35, 36, 35, 33, 33, 3, 1, 0, 32, 32, 16, 1, 1, 64, 63, 63,
    ]  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_of_half_warps(driver: Driver, seed: int) -> None:
    assert run(driver, "two_masks", seed) == [thread ^ 1 for thread in range(64)]


def run_copies(driver: Driver, name: str, seed: int) -> list[int]:
    values = torch.cat([torch.zeros(64), torch.arange(64)]).int()
    assert driver.run(name, values, seed=seed) == 0
    return values[:64].tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_arrive_once_waited_for(driver: Driver, seed: int) -> None:
    assert run_copies(driver, "copies", seed) == list(range(63, -1, -1))


def test_a_copy_not_waited_for_shows(driver: Driver) -> None:
    results = {tuple(run_copies(driver, "copies_not_waited_for", seed)) for seed in SEEDS}
    assert len(results) > 1


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_see_each_other(driver: Driver, seed: int) -> None:
    assert run(driver, "cluster", seed) == [2 * thread + 100 for thread in range(63, -1, -1)]


def test_missing_barrier_of_a_cluster_shows(driver: Driver) -> None:
    results = {tuple(run(driver, "cluster_without_barrier", seed)) for seed in SEEDS}
    assert len(results) > 1


def test_missing_barrier_shows(driver: Driver) -> None:
    results = {tuple(run(driver, "missing_barrier", seed)) for seed in SEEDS}
    assert len(results) > 1


def test_unwritten_shared_memory_shows(driver: Driver) -> None:
    results = {tuple(run(driver, "shared_unwritten", seed)) for seed in SEEDS}
    assert len(results) > 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", "a barrier not reached by every thread of the block: __syncthreads"),
        ("different_barriers", "threads of a block at different barriers: __syncthreads"),
        ("missing_lane", "a collective not reached by every lane of its mask: __shfl_xor_sync"),
        ("outside_mask", "a lane outside the mask it passes: __shfl_sync"),
        ("shuffle_from_outside", "shuffle from a lane outside the mask: __shfl_sync"),
        ("shared_overrun", "heap-buffer-overflow"),
        ("wait_for_ever", "waits for ever"),
        ("crooked_copy", "a copy whose addresses are not multiples of its size: start_copy"),
        ("cluster_left_early", "a look into a block that has ended: in_block"),
        ("cluster_barrier_skipped", "a barrier not reached by every thread of the cluster"),
        ("cluster_exceeded", "a block that the cluster lacks: in_block"),
        ("copy_never_waited_for", "a thread ended before its copy: start_copy"),
    ],
)
@pytest.mark.parametrize("seed", [0, 2])
def test_fault_is_caught(driver: Driver, name: str, message: str, seed: int) -> None:
    with pytest.raises(Fault, match=message):
        run(driver, name, seed)
