"""The compiled CPU kernels (csrc/bindings); only nowag_ext/ops.py calls them."""

from typing import Any

format_version: int
tile_rows: int

def simd_level() -> str: ...
def simd_best() -> str: ...
def __getattr__(name: str) -> Any: ...
