"""Normalisation on the host SIMT executor (simt_cases.py)."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from simt_cases import CODES, DTYPES, SEEDS, needs_compiler, poisoned, randn
from simt_host import Driver

from nowag_ext import ops

pytestmark = needs_compiler


def assert_normalizes(driver: Driver, base: torch.Tensor, cols: int, seed: int) -> None:
    rows, stride = base.shape
    outputs = poisoned(rows, cols), poisoned(rows), poisoned(cols)
    arguments = [base, CODES[base.dtype], rows, cols, stride, *outputs]
    assert driver.run("normalize", *arguments, seed=seed) == 0
    for got, want in zip(outputs, ops.normalize(base[:, :cols]), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (3, 33), (65, 31), (130, 257), (2, 4096), (2, 16500)]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_normalize(driver: Driver, rows: int, cols: int, dtype: torch.dtype, seed: int) -> None:
    assert_normalizes(driver, randn(rows, cols + 3, seed=1).to(dtype), cols, seed)


@pytest.mark.parametrize("cols", [255, 256, 300, 1000])
def test_normalize_rows_longer_than_shared_memory(cols: int) -> None:
    driver = Driver(SIMT_SHARED_KIB="1")
    assert_normalizes(driver, randn(3, cols, seed=2), cols, seed=2)
    driver.close()
