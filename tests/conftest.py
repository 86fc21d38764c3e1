"""Shared by the tests: no network, poisoned allocations, thread counts, SIMT, hypothesis."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported. No test needs a network, and threads that wait shall not spin: where the
# cores have other work, that makes minutes of seconds.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings
from simt_host import Driver

# Here, so that where its kernels are not built this is said once and not of every file of tests.
import nowag_ext.ops  # noqa: F401

# Kernels write into torch.empty: filling it with NaN (or the largest integer) makes an element that
# a kernel forgot show up in every comparison.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

settings.register_profile(
    "nowag", deadline=None, max_examples=25, suppress_health_check=list(HealthCheck)
)
settings.load_profile("nowag")


# Under the sanitizers (.ci/sanitize) one number will do.
_THREADS = [int(count) for count in os.environ.get("NOWAG_TEST_THREADS", "1,2,3").split(",")]


@pytest.fixture(params=_THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test at several thread counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model spends its time waiting for threads, on a busy machine seconds of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    """The process that runs CUDA kernels on the host."""
    driver = Driver()
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def clustered_driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """The same with the clusters of compute capability 9.0: so many of each size, a parameter."""
    driver = Driver(SIMT_SHARED_KIB="227", SIMT_CLUSTERS=request.param)
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def roomy_driver() -> Iterator[Driver]:
    """The same with as much shared memory as a block has on compute capability 8.0."""
    driver = Driver(SIMT_SHARED_KIB="163")
    yield driver
    driver.close()
