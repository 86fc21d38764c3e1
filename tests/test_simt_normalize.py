"""Normalisation on the host SIMT executor (simt_cases.py)."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from simt_cases import CODES, DTYPES, needs_compiler, poisoned, randn
from simt_host import Driver

from nowag_ext import ops

pytestmark = needs_compiler


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 33), (65, 31), (130, 257)])
def test_normalize(driver: Driver, rows: int, cols: int, dtype: torch.dtype) -> None:
    base = randn(rows, cols + 3, seed=1).to(dtype)
    outputs = poisoned(rows, cols), poisoned(rows), poisoned(cols)
    assert driver.run("normalize", base, CODES[dtype], rows, cols, cols + 3, *outputs) == 0
    for got, want in zip(outputs, ops.normalize(base[:, :cols]), strict=True):
        assert_same_bits(got, want)
