"""The compiled CPU kernels (csrc/bindings); nowag_ext.ops alone calls them.

Written by tests/cpu_stub.py. Addresses, sizes and the numbers of enumerators are integers.
"""

from collections.abc import Sequence
from typing import Protocol, type_check_only

bfloat16: int
bitmap_align: int
float16: int
float32: int
format_version: int
init_plus_plus: int
init_random: int
max_code_bits: int
max_group: int
max_subvector: int
norm_eps: float
sparse_gemv_max_tokens: int
tape_add: int
tape_attention: int
tape_boolean: int
tape_copy: int
tape_divide: int
tape_features: int
tape_gelu_tanh: int
tape_index_copy: int
tape_int64: int
tape_mean: int
tape_multiply: int
tape_negate: int
tape_queries: int
tape_reciprocal_sqrt: int
tape_select: int
tape_sigmoid: int
tape_silu: int
tape_subtract: int
tape_tanh: int
tape_words: int
tile_rows: int
vq_gemv_max_tokens: int
vq_max_members: int

def simd_level() -> str: ...
def simd_best() -> str: ...
def vq_gemv_device_tokens(dtype: int, d: int, code_bits: int, /) -> int: ...
def normalize(
    weight: int,
    dtype: int,
    rows: int,
    cols: int,
    row_stride: int,
    out: int,
    row_norms: int,
    col_norms: int,
    threads: int,
    /,
) -> None: ...
def kmeans_assign(
    problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
    entries: int,
    d: int,
    scale: float,
    warm: bool,
    changed: int,
    threads: int,
    /,
) -> None: ...
def kmeans_update(
    sums: int,
    entries: int,
    d: int,
    scale: float,
    codebook: int,
    objective_drop: int,
    empty: int,
    threads: int,
    /,
) -> None: ...
def kmeans_errors(
    problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
    entries: int,
    d: int,
    errors: int,
    threads: int,
    /,
) -> None: ...
def kmeans_spread(
    problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
    entries: int,
    d: int,
    scale: float,
    spread: int,
    threads: int,
    /,
) -> None: ...
def kmeans_merge_costs(
    sums: int,
    codebook: int,
    entries: int,
    d: int,
    scale: float,
    chosen: int,
    count: int,
    costs: int,
    threads: int,
    /,
) -> None: ...
def kmeans_energy(
    problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
    d: int,
    energy: int,
    threads: int,
    /,
) -> None: ...
def kmeans_seed(
    problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
    entries: int,
    d: int,
    init: int,
    seed: int,
    codebook: int,
    threads: int,
    /,
) -> None: ...
def kmeans_feedback(
    x: int,
    x_stride: int,
    carried: int,
    factor: int,
    factor_stride: int,
    codebook: int,
    rows: int,
    positions: int,
    entries: int,
    d: int,
    codes: int,
    scale: float,
    sums: int,
    threads: int,
    /,
) -> None: ...
def prune_select(
    w: int,
    h: int,
    rows: int,
    cols: int,
    n_prune: int,
    bitmap: int,
    threads: int,
    /,
) -> None: ...
def prune_select_nm(
    w: int,
    h: int,
    rows: int,
    cols: int,
    n: int,
    m: int,
    bitmap: int,
    threads: int,
    /,
) -> None: ...
def prune_objective(
    w: int,
    h: int,
    bitmap: int,
    rows: int,
    cols: int,
    sums: int,
    threads: int,
    /,
) -> None: ...
def pack_codes(
    codes: int,
    rows: int,
    positions: int,
    code_bits: int,
    packed: int,
    threads: int,
    /,
) -> None: ...
def unpack_codes(
    packed: int,
    rows: int,
    positions: int,
    code_bits: int,
    codes: int,
    threads: int,
    /,
) -> None: ...
def vq_dequantize(
    packed: int,
    codebook: int,
    row_norms: int,
    col_norms: int,
    rows: int,
    cols: int,
    d: int,
    code_bits: int,
    row_begin: int,
    row_end: int,
    out: int,
    dtype: int,
    out_stride: int,
    threads: int,
    /,
) -> None: ...
def vq_gather(
    packed: int,
    codebook: int,
    row_norms: int,
    col_norms: int,
    rows: int,
    cols: int,
    d: int,
    code_bits: int,
    indices: int,
    count: int,
    out: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def sparse_offsets(
    bitmap: int,
    rows: int,
    cols: int,
    row_offsets: int,
    threads: int,
    /,
) -> None: ...
def sparse_pack(
    weight: int,
    dtype: int,
    rows: int,
    cols: int,
    row_stride: int,
    bitmap: int,
    row_offsets: int,
    kept: int,
    values: int,
    threads: int,
    /,
) -> None: ...
def sparse_dequantize(
    bitmap: int,
    values: int,
    values_dtype: int,
    row_offsets: int,
    kept: int,
    rows: int,
    cols: int,
    row_begin: int,
    row_end: int,
    out: int,
    out_dtype: int,
    out_stride: int,
    threads: int,
    /,
) -> None: ...
def vq_gemv(
    x: int,
    dtype: int,
    tokens: int,
    packed: int,
    codebook: int,
    row_norms: int,
    col_norms: int,
    bias: int,
    rows: int,
    cols: int,
    d: int,
    code_bits: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def vq_gemv_group(
    x: int,
    dtype: int,
    tokens: int,
    cols: int,
    members: int,
    count: int,
    threads: int,
    /,
) -> None: ...
def sparse_gemv(
    x: int,
    dtype: int,
    tokens: int,
    bitmap: int,
    values: int,
    values_dtype: int,
    row_offsets: int,
    kept: int,
    bias: int,
    rows: int,
    cols: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def kmeans_assign_exhaustive(
    problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
    entries: int,
    d: int,
    scale: float,
    warm: bool,
    changed: int,
    threads: int,
    /,
) -> None: ...
def tape_run(steps: int, count: int, threads: int, /) -> None: ...

@type_check_only
class Kernels(Protocol):
    """What every backend offers: queue is the number of threads, or a device's stream."""

    def normalize(
        self,
        weight: int,
        dtype: int,
        rows: int,
        cols: int,
        row_stride: int,
        out: int,
        row_norms: int,
        col_norms: int,
        queue: int,
        /,
    ) -> None: ...
    def kmeans_assign(
        self,
        problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
        entries: int,
        d: int,
        scale: float,
        warm: bool,
        changed: int,
        queue: int,
        /,
    ) -> None: ...
    def kmeans_update(
        self,
        sums: int,
        entries: int,
        d: int,
        scale: float,
        codebook: int,
        objective_drop: int,
        empty: int,
        queue: int,
        /,
    ) -> None: ...
    def kmeans_errors(
        self,
        problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
        entries: int,
        d: int,
        errors: int,
        queue: int,
        /,
    ) -> None: ...
    def kmeans_spread(
        self,
        problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
        entries: int,
        d: int,
        scale: float,
        spread: int,
        queue: int,
        /,
    ) -> None: ...
    def kmeans_merge_costs(
        self,
        sums: int,
        codebook: int,
        entries: int,
        d: int,
        scale: float,
        chosen: int,
        count: int,
        costs: int,
        queue: int,
        /,
    ) -> None: ...
    def kmeans_energy(
        self,
        problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
        d: int,
        energy: int,
        queue: int,
        /,
    ) -> None: ...
    def kmeans_seed(
        self,
        problems: Sequence[tuple[int, int, int, int, int, int, int, int, int]],
        entries: int,
        d: int,
        init: int,
        seed: int,
        codebook: int,
        queue: int,
        /,
    ) -> None: ...
    def kmeans_feedback(
        self,
        x: int,
        x_stride: int,
        carried: int,
        factor: int,
        factor_stride: int,
        codebook: int,
        rows: int,
        positions: int,
        entries: int,
        d: int,
        codes: int,
        scale: float,
        sums: int,
        queue: int,
        /,
    ) -> None: ...
    def prune_select(
        self,
        w: int,
        h: int,
        rows: int,
        cols: int,
        n_prune: int,
        bitmap: int,
        queue: int,
        /,
    ) -> None: ...
    def prune_select_nm(
        self,
        w: int,
        h: int,
        rows: int,
        cols: int,
        n: int,
        m: int,
        bitmap: int,
        queue: int,
        /,
    ) -> None: ...
    def prune_objective(
        self,
        w: int,
        h: int,
        bitmap: int,
        rows: int,
        cols: int,
        sums: int,
        queue: int,
        /,
    ) -> None: ...
    def pack_codes(
        self,
        codes: int,
        rows: int,
        positions: int,
        code_bits: int,
        packed: int,
        queue: int,
        /,
    ) -> None: ...
    def unpack_codes(
        self,
        packed: int,
        rows: int,
        positions: int,
        code_bits: int,
        codes: int,
        queue: int,
        /,
    ) -> None: ...
    def vq_dequantize(
        self,
        packed: int,
        codebook: int,
        row_norms: int,
        col_norms: int,
        rows: int,
        cols: int,
        d: int,
        code_bits: int,
        row_begin: int,
        row_end: int,
        out: int,
        dtype: int,
        out_stride: int,
        queue: int,
        /,
    ) -> None: ...
    def vq_gather(
        self,
        packed: int,
        codebook: int,
        row_norms: int,
        col_norms: int,
        rows: int,
        cols: int,
        d: int,
        code_bits: int,
        indices: int,
        count: int,
        out: int,
        dtype: int,
        queue: int,
        /,
    ) -> None: ...
    def sparse_offsets(
        self,
        bitmap: int,
        rows: int,
        cols: int,
        row_offsets: int,
        queue: int,
        /,
    ) -> None: ...
    def sparse_pack(
        self,
        weight: int,
        dtype: int,
        rows: int,
        cols: int,
        row_stride: int,
        bitmap: int,
        row_offsets: int,
        kept: int,
        values: int,
        queue: int,
        /,
    ) -> None: ...
    def sparse_dequantize(
        self,
        bitmap: int,
        values: int,
        values_dtype: int,
        row_offsets: int,
        kept: int,
        rows: int,
        cols: int,
        row_begin: int,
        row_end: int,
        out: int,
        out_dtype: int,
        out_stride: int,
        queue: int,
        /,
    ) -> None: ...
    def vq_gemv(
        self,
        x: int,
        dtype: int,
        tokens: int,
        packed: int,
        codebook: int,
        row_norms: int,
        col_norms: int,
        bias: int,
        rows: int,
        cols: int,
        d: int,
        code_bits: int,
        y: int,
        queue: int,
        /,
    ) -> None: ...
    def vq_gemv_group(
        self,
        x: int,
        dtype: int,
        tokens: int,
        cols: int,
        members: int,
        count: int,
        queue: int,
        /,
    ) -> None: ...
    def sparse_gemv(
        self,
        x: int,
        dtype: int,
        tokens: int,
        bitmap: int,
        values: int,
        values_dtype: int,
        row_offsets: int,
        kept: int,
        bias: int,
        rows: int,
        cols: int,
        y: int,
        queue: int,
        /,
    ) -> None: ...
