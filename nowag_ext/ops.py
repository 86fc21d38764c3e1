"""The one caller of the compiled modules: torch.library schemas, fakes, checks, output allocation.

Every operation is a ``torch.ops.nowag.*`` op under the name of its header in
``csrc/include/nowag``, which states the math, the layouts and the tie rules. The module-level names
here are those ops. Addresses, sizes and the number of threads (CPU) or the stream (CUDA) go to the
compiled module as integers; it returns nothing and raises on a bad status.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nowag_ext.gemm import gemm_dtype

try:
    import nowag_ext._cpu as _cpu
except ModuleNotFoundError:  # a module that is there but does not load says itself why
    raise ImportError(
        f"there are no compiled kernels in {Path(__file__).parent}: these are the sources, which "
        "hide an installed nowag_ext from Python when it is started in their folder. Start it in "
        "another folder, or put the kernels here with `pip install -e .`"
    ) from None

_cuda: Any
try:
    from nowag_ext import _cuda  # type: ignore[attr-defined,no-redef]
except ImportError:
    _cuda = None

_LIBRARY = torch.library.Library("nowag", "DEF")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

FORMAT_VERSION: int = _cpu.format_version
TILE_ROWS: int = _cpu.tile_rows
BITMAP_ALIGN = 64
MAX_SUBVECTOR = 8
MAX_CODE_BITS = 16


def _op(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Defines ``nowag::<schema>`` with one implementation for both backends, and its fake."""

    def register(implementation: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, implementation, key)
        torch.library.register_fake(f"nowag::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.nowag, name).default

    return register


def _backend(device: torch.device) -> tuple[Any, int]:
    """The compiled module for a device, and its last argument: threads, or the stream."""
    if device.type == "cpu":
        return _cpu, torch.get_num_threads()
    if _cuda is None:
        raise RuntimeError(
            "nowag_ext was built without CUDA, so its kernels cannot run on "
            f"{device}: install the CUDA toolkit (nvcc) and reinstall with NOWAG_CUDA=1, or move "
            "the tensors to the CPU."
        )
    return _on_device(device.index or 0), torch.cuda.current_stream(device).cuda_stream


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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _dtype(tensor: Tensor, what: str) -> int:
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{what} must be torch.float32, torch.float16 or torch.bfloat16, not {tensor.dtype}."
        )
    return _DTYPES[tensor.dtype]


def _check(tensor: Tensor, what: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raises unless ``tensor`` is contiguous and of this dtype and shape."""
    if tensor.dtype != dtype:
        raise TypeError(f"{what} must be {dtype}, not {tensor.dtype}.")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{what} must have shape {tuple(shape)}, not {tuple(tensor.shape)}.")
    _require(tensor.is_contiguous(), f"{what} must be contiguous.")
    if tensor.is_cuda and dtype == torch.uint8:
        _check_words(what, tensor.data_ptr(), shape[-1])


def _check_words(what: str, address: int, row_bytes: int) -> None:
    """Raises where CUDA kernels could not read rows of bytes in words, as wide as rows allow."""
    multiple = math.gcd(row_bytes, 16)
    _require(
        address % multiple == 0,
        f"{what} must start at a multiple of {multiple} bytes in the device's memory, not at "
        f"{address:#x}: pass a clone().",
    )


def _same_device(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, not on {tensor.device}.")


def code_positions(in_features: int, d: int) -> int:
    """Number of sub-vectors a row is cut into, the last one padded."""
    return -(-in_features // d)


def packed_shape(out_features: int, in_features: int, d: int, code_bits: int) -> tuple[int, ...]:
    """Shape of the packed codes (csrc/include/nowag/format.h)."""
    return (-(-out_features // TILE_ROWS), code_positions(in_features, d), 4 * code_bits)


def bitmap_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of the bitmap of kept weights (csrc/include/nowag/format.h)."""
    return (out_features, BITMAP_ALIGN // 8 * -(-in_features // BITMAP_ALIGN))


# --- normalize.h ----------------------------------------------------------------------------------


def _normalize_fake(weight: Tensor) -> tuple[Tensor, ...]:
    rows, cols = weight.shape
    return tuple(
        weight.new_empty(shape, dtype=torch.float32) for shape in ((rows, cols), (rows,), (cols,))
    )


@_op("normalize(Tensor weight) -> (Tensor, Tensor, Tensor)", _normalize_fake)
def normalize(weight: Tensor) -> tuple[Tensor, ...]:
    """Columns, then rows, to unit norm: (normalized fp32, row_norms fp32, col_norms fp32)."""
    dtype = _dtype(weight, "weight")
    _require(
        weight.dim() == 2 and weight.numel() > 0,
        f"weight must be a non-empty matrix, not of shape {tuple(weight.shape)}.",
    )
    if weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        weight = weight.contiguous()
    outputs = _normalize_fake(weight)
    backend, queue = _backend(weight.device)
    backend.normalize(
        weight.data_ptr(), dtype, *weight.shape, weight.stride(0),
        *(output.data_ptr() for output in outputs), queue,
    )  # fmt: skip
    return outputs


# --- kmeans.h -------------------------------------------------------------------------------------


def kmeans_scale(points_weight: float, largest: float = 1.0) -> float:
    """The power of two that fixed-point sums are multiplied by (kmeans.h).

    ``points_weight`` is the sum of h over all points and coordinates, ``largest`` bounds |x|.
    """
    return 2.0 ** (61 - math.ceil(math.log2(points_weight * max(1.0, largest))))


def _problems(
    w: Sequence[Tensor],
    h: Sequence[Tensor],
    d: int,
    codebooks: Sequence[Tensor] = (),
    codes: Sequence[Tensor] = (),
    sums: Sequence[Tensor] = (),
    previous: Sequence[Tensor] = (),
    gaps: Sequence[Tensor] = (),
) -> list[tuple[int, ...]]:
    """Checks a batch of k-means problems; returns the addresses and sizes of KmeansProblem."""
    _require(
        len(w) > 0 and len(w) == len(h), "w and h must be lists of the same length, not empty."
    )
    _require(1 <= d <= MAX_SUBVECTOR, f"d must be from 1 to {MAX_SUBVECTOR}, not {d}.")
    named = {
        "codebooks": codebooks, "codes": codes, "sums": sums, "previous": previous, "gaps": gaps,
    }  # fmt: skip
    for name, tensors in named.items():
        _require(
            len(tensors) in (0, len(w)), f"{name} must have one tensor a problem, or none at all."
        )
    entries = codebooks[0].shape[0] if codebooks else 0
    rows_of_addresses = []
    for index in range(len(w)):
        _require(
            w[index].dim() == 2 and w[index].numel() > 0,
            f"w must be a non-empty matrix, not of shape {tuple(w[index].shape)}.",
        )
        rows, cols = w[index].shape
        positions = code_positions(cols, d)
        _check(w[index], "w", torch.float32, (rows, cols))
        _check(h[index], "h", torch.float32, (positions * d,))
        operands = [w[index], h[index]]
        if codebooks:
            _check(codebooks[index], "codebook", torch.float32, (entries, d))
        if codes:
            _check(codes[index], "codes", torch.uint16, (rows, positions))
        if sums:
            _check(sums[index], "sums", torch.int64, (entries, 2 * d + 1))
        if previous:
            _check(previous[index], "previous", torch.float32, (entries, d))
        if gaps:
            _check(gaps[index], "gaps", torch.float32, (rows, positions))
        optional = [tensors[index] if tensors else None for tensors in named.values()]
        for tensor in (*operands, *optional):
            _same_device(w[0].device, tensor=tensor)
        addresses = [tensor.data_ptr() if tensor is not None else 0 for tensor in optional]
        rows_of_addresses.append(
            (w[index].data_ptr(), h[index].data_ptr(), *addresses[:3], rows, cols, *addresses[3:])
        )
    return rows_of_addresses


def _kmeans_assign_fake(w: Sequence[Tensor], *_: Any, **__: Any) -> Tensor:
    return w[0].new_empty(len(w), dtype=torch.int64)


@_op(
    "kmeans_assign(Tensor[] w, Tensor[] h, Tensor[] codebooks, Tensor(a!)[] codes, "
    "Tensor(b!)[] sums, float scale, bool warm, Tensor[]? previous=None, Tensor(c!)[]? gaps=None) "
    "-> Tensor",
    _kmeans_assign_fake,
)
def kmeans_assign(
    w: Sequence[Tensor],
    h: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    codes: Sequence[Tensor],
    sums: Sequence[Tensor],
    scale: float,
    warm: bool,
    previous: Sequence[Tensor] | None = None,
    gaps: Sequence[Tensor] | None = None,
) -> Tensor:
    """Nearest entry of every sub-vector; updates the sums; returns the changes per problem.

    ``previous`` and ``gaps`` are the optional memory between iterations of KmeansProblem.
    """
    _require(len(codebooks) > 0, "codebooks must not be empty.")
    entries, d = codebooks[0].shape
    _require(1 <= entries <= 2**MAX_CODE_BITS, f"a codebook has 1 to 65536 entries, not {entries}.")
    problems = _problems(w, h, d, codebooks, codes, sums, previous or (), gaps or ())
    changed = _kmeans_assign_fake(w)
    backend, queue = _backend(w[0].device)
    backend.kmeans_assign(problems, entries, d, scale, warm, changed.data_ptr(), queue)
    return changed


def kmeans_assign_exhaustive(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor) -> None:
    """Nearest entry of every sub-vector of a matrix on the CPU, by looking at every entry.

    A yardstick for tests and benchmarks: ``kmeans_assign`` gives the same codes sooner.
    """
    entries, d = codebook.shape
    problems = _problems([w], [h], d, [codebook], [codes])
    changed = torch.empty(1, dtype=torch.int64)
    _cpu.kmeans_assign(
        problems, entries, d, 1.0, False, changed.data_ptr(), torch.get_num_threads(), True
    )


def _kmeans_update_fake(sums: Tensor, scale: float, codebook: Tensor) -> tuple[Tensor, Tensor]:
    return codebook.new_empty((), dtype=torch.float64), codebook.new_empty(
        codebook.shape[0], dtype=torch.bool
    )


@_op(
    "kmeans_update(Tensor sums, float scale, Tensor(a!) codebook) -> (Tensor, Tensor)",
    _kmeans_update_fake,
)
def kmeans_update(sums: Tensor, scale: float, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Moves entries to their means in place: (objective_drop fp64 [], empty bool [K])."""
    entries, d = codebook.shape
    _check(codebook, "codebook", torch.float32, (entries, d))
    _check(sums, "sums", torch.int64, (entries, 2 * d + 1))
    _same_device(codebook.device, sums=sums)
    drop, empty = _kmeans_update_fake(sums, scale, codebook)
    backend, queue = _backend(codebook.device)
    backend.kmeans_update(
        sums.data_ptr(), entries, d, scale, codebook.data_ptr(), drop.data_ptr(),
        empty.data_ptr(), queue,
    )  # fmt: skip
    return drop, empty


def _kmeans_errors_fake(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    return w.new_empty(codes.shape, dtype=torch.float32)


@_op(
    "kmeans_errors(Tensor w, Tensor h, Tensor codebook, Tensor codes) -> Tensor",
    _kmeans_errors_fake,
)
def kmeans_errors(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """Weighted squared error of every sub-vector under its assigned entry, fp32 [rows, P]."""
    entries, d = codebook.shape
    problems = _problems([w], [h], d, [codebook], [codes])
    errors = _kmeans_errors_fake(w, h, codebook, codes)
    backend, queue = _backend(w.device)
    backend.kmeans_errors(problems, entries, d, errors.data_ptr(), queue)
    return errors


def _kmeans_spread_fake(
    w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, scale: float
) -> Tensor:
    return w.new_empty(codebook.shape, dtype=torch.int64)


@_op(
    "kmeans_spread(Tensor w, Tensor h, Tensor codebook, Tensor codes, float scale) -> Tensor",
    _kmeans_spread_fake,
)
def kmeans_spread(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, scale: float) -> Tensor:
    """Weighted squared error of every entry by coordinate, times the scale, int64 [K, d]."""
    entries, d = codebook.shape
    problems = _problems([w], [h], d, [codebook], [codes])
    spread = _kmeans_spread_fake(w, h, codebook, codes, scale)
    backend, queue = _backend(w.device)
    backend.kmeans_spread(problems, entries, d, scale, spread.data_ptr(), queue)
    return spread


def _kmeans_merge_costs_fake(
    sums: Tensor, codebook: Tensor, scale: float, chosen: Tensor
) -> Tensor:
    return codebook.new_empty(chosen.shape, dtype=torch.float32)


@_op(
    "kmeans_merge_costs(Tensor sums, Tensor codebook, float scale, Tensor chosen) -> Tensor",
    _kmeans_merge_costs_fake,
)
def kmeans_merge_costs(sums: Tensor, codebook: Tensor, scale: float, chosen: Tensor) -> Tensor:
    """What giving up each of the entries chosen, int64 [n] below K, adds to the objective: [n]."""
    entries, d = codebook.shape
    _check(codebook, "codebook", torch.float32, (entries, d))
    _check(sums, "sums", torch.int64, (entries, 2 * d + 1))
    _check(chosen, "chosen", torch.int64, (chosen.numel(),))
    _same_device(codebook.device, sums=sums, chosen=chosen)
    costs = _kmeans_merge_costs_fake(sums, codebook, scale, chosen)
    backend, queue = _backend(codebook.device)
    backend.kmeans_merge_costs(
        sums.data_ptr(), codebook.data_ptr(), entries, d, scale, chosen.data_ptr(),
        chosen.numel(), costs.data_ptr(), queue,
    )  # fmt: skip
    return costs


def _kmeans_energy_fake(w: Tensor, h: Tensor, d: int) -> Tensor:
    return w.new_empty((), dtype=torch.float64)


@_op("kmeans_energy(Tensor w, Tensor h, int d) -> Tensor", _kmeans_energy_fake)
def kmeans_energy(w: Tensor, h: Tensor, d: int) -> Tensor:
    """sum of h x^2 over all points, fp64 []: the denominator of the relative objective."""
    problems = _problems([w], [h], d)
    energy = _kmeans_energy_fake(w, h, d)
    backend, queue = _backend(w.device)
    backend.kmeans_energy(problems, d, energy.data_ptr(), queue)
    return energy


_INITS = {"random": 0, "kmeans++": 1}


def _kmeans_seed_fake(
    w: Sequence[Tensor], h: Sequence[Tensor], entries: int, d: int, init: str, seed: int
) -> Tensor:
    return w[0].new_empty((entries, d), dtype=torch.float32)


@_op(
    "kmeans_seed(Tensor[] w, Tensor[] h, int entries, int d, str init, int seed) -> Tensor",
    _kmeans_seed_fake,
)
def kmeans_seed(
    w: Sequence[Tensor], h: Sequence[Tensor], entries: int, d: int, init: str, seed: int
) -> Tensor:
    """A starting codebook, fp32 [entries, d], from the points of all problems together."""
    _require(init in _INITS, f"init must be one of {sorted(_INITS)}, not {init!r}.")
    problems = _problems(w, h, d)
    points = sum(matrix.shape[0] * code_positions(matrix.shape[1], d) for matrix in w)
    _require(
        1 <= entries <= points,
        f"a codebook of {entries} entries needs at least as many sub-vectors, but there are "
        f"{points}.",
    )
    codebook = _kmeans_seed_fake(w, h, entries, d, init, seed)
    backend, queue = _backend(w[0].device)
    backend.kmeans_seed(problems, entries, d, _INITS[init], seed, codebook.data_ptr(), queue)
    return codebook


# --- prune.h --------------------------------------------------------------------------------------


def _check_saliency(w: Tensor, h: Tensor) -> None:
    _require(
        w.dim() == 2 and w.numel() > 0,
        f"w must be a non-empty matrix, not of shape {tuple(w.shape)}.",
    )
    _check(w, "w", torch.float32, tuple(w.shape))
    _check(h, "h", torch.float32, (w.shape[1],))
    _same_device(w.device, h=h)


def _bitmap_fake(w: Tensor, *_: Any) -> Tensor:
    return w.new_empty(bitmap_shape(*w.shape), dtype=torch.uint8)


@_op("prune_select(Tensor w, Tensor h, int n_prune) -> Tensor", _bitmap_fake)
def prune_select(w: Tensor, h: Tensor, n_prune: int) -> Tensor:
    """Bitmap of the weights kept when the n_prune smallest saliencies of the layer go."""
    _check_saliency(w, h)
    _require(0 <= n_prune <= w.numel(), f"n_prune must be from 0 to {w.numel()}, not {n_prune}.")
    bitmap = _bitmap_fake(w)
    backend, queue = _backend(w.device)
    backend.prune_select(w.data_ptr(), h.data_ptr(), *w.shape, n_prune, bitmap.data_ptr(), queue)
    return bitmap


@_op("prune_select_nm(Tensor w, Tensor h, int n, int m) -> Tensor", _bitmap_fake)
def prune_select_nm(w: Tensor, h: Tensor, n: int, m: int) -> Tensor:
    """Bitmap of the n weights kept of every m consecutive inputs."""
    _check_saliency(w, h)
    _require(1 <= n <= m <= 32, f"an N:M pattern needs 1 <= N <= M <= 32, not {n}:{m}.")
    _require(w.shape[1] % m == 0, f"in_features {w.shape[1]} is not a multiple of M = {m}.")
    bitmap = _bitmap_fake(w)
    backend, queue = _backend(w.device)
    backend.prune_select_nm(w.data_ptr(), h.data_ptr(), *w.shape, n, m, bitmap.data_ptr(), queue)
    return bitmap


def _prune_objective_fake(w: Tensor, h: Tensor, bitmap: Tensor) -> Tensor:
    return w.new_empty(2, dtype=torch.float64)


@_op("prune_objective(Tensor w, Tensor h, Tensor bitmap) -> Tensor", _prune_objective_fake)
def prune_objective(w: Tensor, h: Tensor, bitmap: Tensor) -> Tensor:
    """Sums of the pruned saliencies and of all of them, fp64 [2]."""
    _check_saliency(w, h)
    _check(bitmap, "bitmap", torch.uint8, bitmap_shape(*w.shape))
    _same_device(w.device, bitmap=bitmap)
    sums = _prune_objective_fake(w, h, bitmap)
    backend, queue = _backend(w.device)
    backend.prune_objective(
        w.data_ptr(), h.data_ptr(), bitmap.data_ptr(), *w.shape, sums.data_ptr(), queue
    )
    return sums


# --- vq_pack.h ------------------------------------------------------------------------------------


def _pack_codes_fake(codes: Tensor, code_bits: int) -> Tensor:
    return codes.new_empty(
        packed_shape(codes.shape[0], codes.shape[1], 1, code_bits), dtype=torch.uint8
    )


@_op("pack_codes(Tensor codes, int code_bits) -> Tensor", _pack_codes_fake)
def pack_codes(codes: Tensor, code_bits: int) -> Tensor:
    """uint16 codes [rows, P] to packed uint8; raises on a code of code_bits bits or more."""
    _require(
        codes.dim() == 2 and codes.numel() > 0,
        f"codes must be a non-empty matrix, not of shape {tuple(codes.shape)}.",
    )
    _check(codes, "codes", torch.uint16, tuple(codes.shape))
    _require(1 <= code_bits <= MAX_CODE_BITS, f"code_bits must be from 1 to 16, not {code_bits}.")
    packed = _pack_codes_fake(codes, code_bits)
    if codes.is_cuda:  # its launcher cannot wait for an answer, so that this has to
        largest = int(codes.to(torch.int32).max())
        _require(largest < 2**code_bits, f"code {largest} does not fit into {code_bits} bits.")
    backend, queue = _backend(codes.device)
    backend.pack_codes(codes.data_ptr(), *codes.shape, code_bits, packed.data_ptr(), queue)
    return packed


def _unpack_codes_fake(packed: Tensor, rows: int) -> Tensor:
    return packed.new_empty((rows, packed.shape[1]), dtype=torch.uint16)


@_op("unpack_codes(Tensor packed, int rows) -> Tensor", _unpack_codes_fake)
def unpack_codes(packed: Tensor, rows: int) -> Tensor:
    """Packed uint8 codes to uint16 [rows, P]."""
    _require(packed.dim() == 3, f"packed codes have 3 dimensions, not {packed.dim()}.")
    _, positions, tile_bytes = packed.shape
    _check(packed, "packed codes", torch.uint8, packed_shape(rows, positions, 1, tile_bytes // 4))
    codes = _unpack_codes_fake(packed, rows)
    backend, queue = _backend(packed.device)
    backend.unpack_codes(
        packed.data_ptr(), rows, positions, tile_bytes // 4, codes.data_ptr(), queue
    )
    return codes


_VqSizes = tuple[int, int, int, int]
_VQ_SIZES: dict[tuple[Any, ...], _VqSizes] = {}


def _vq_sizes(codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor) -> _VqSizes:
    """(rows, cols, d, code_bits) of a VQ weight whose shapes, dtypes and devices agree.

    Run for every token of every layer: what depends on shapes, dtypes and devices is checked once
    for each combination of them, and remembered.
    """
    vq = (codes, codebook, row_norms, col_norms)
    key = (
        codes.shape, codebook.shape, row_norms.shape, col_norms.shape,
        codes.dtype, codebook.dtype, row_norms.dtype, col_norms.dtype,
        codes.device, codebook.device, row_norms.device, col_norms.device,
    )  # fmt: skip
    sizes = _VQ_SIZES.get(key)
    if sizes is None:
        sizes = _VQ_SIZES[key] = _check_vq(*vq)
    for tensor in vq:
        if not tensor.is_contiguous():
            raise ValueError("codes, codebook, row_norms and col_norms must be contiguous.")
    if codes.is_cuda:
        _check_words("codes", codes.data_ptr(), codes.shape[2])
        _check_words("codebook", codebook.data_ptr(), 4)
    return sizes


def _check_vq(codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor) -> _VqSizes:
    _require(
        codes.dim() == 3 and codebook.dim() == 2,
        f"codes must have 3 dimensions and codebook 2, not {codes.dim()} and {codebook.dim()}.",
    )
    rows, cols = row_norms.numel(), col_norms.numel()
    d, code_bits = codebook.shape[1], codes.shape[2] // 4
    _require(
        1 <= d <= MAX_SUBVECTOR and 1 <= code_bits <= MAX_CODE_BITS and rows > 0 and cols > 0,
        f"d must be from 1 to 8, code bits from 1 to 16 and the shape not empty, not {d}, "
        f"{code_bits} and {(rows, cols)}.",
    )
    _check(codes, "codes", torch.uint8, packed_shape(rows, cols, d, code_bits))
    _check(codebook, "codebook", torch.float16, (2**code_bits, d))
    _check(row_norms, "row_norms", torch.float16, (rows,))
    _check(col_norms, "col_norms", torch.float16, (cols,))
    _same_device(codes.device, codebook=codebook, row_norms=row_norms, col_norms=col_norms)
    return rows, cols, d, code_bits


def _dequantize_vq_rows(
    vq: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int, int],
    begin: int,
    end: int,
    out: Tensor,
) -> None:
    """Writes rows [begin, end) as dense values into the first rows of ``out``."""
    backend, queue = _backend(out.device)
    backend.vq_dequantize(
        *(tensor.data_ptr() for tensor in vq), *sizes, begin, end, out.data_ptr(),
        _DTYPES[out.dtype], out.stride(0), queue,
    )  # fmt: skip


def _vq_dequantize_fake(
    codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((row_norms.shape[0], col_norms.shape[0]), dtype=dtype)


@_op(
    "vq_dequantize(Tensor codes, Tensor codebook, Tensor row_norms, Tensor col_norms, "
    "ScalarType dtype) -> Tensor",
    _vq_dequantize_fake,
)
def vq_dequantize(
    codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor, dtype: torch.dtype
) -> Tensor:
    """The dense weight [out_features, in_features] of a VQ weight."""
    vq = (codes, codebook, row_norms, col_norms)
    sizes = _vq_sizes(*vq)
    out = _vq_dequantize_fake(*vq, dtype)
    _dtype(out, "dtype")
    _dequantize_vq_rows(vq, sizes, 0, sizes[0], out)
    return out


# --- sparse_pack.h --------------------------------------------------------------------------------


def _sparse_offsets_fake(bitmap: Tensor, cols: int) -> Tensor:
    return bitmap.new_empty(bitmap.shape[0] + 1, dtype=torch.int32)


@_op("sparse_offsets(Tensor bitmap, int cols) -> Tensor", _sparse_offsets_fake)
def sparse_offsets(bitmap: Tensor, cols: int) -> Tensor:
    """Running popcount of a bitmap's rows, int32 [rows + 1]."""
    rows = bitmap.shape[0]
    _require(rows > 0 and cols > 0, f"the shape must not be empty, not {(rows, cols)}.")
    _check(bitmap, "bitmap", torch.uint8, bitmap_shape(rows, cols))
    offsets = _sparse_offsets_fake(bitmap, cols)
    backend, queue = _backend(bitmap.device)
    backend.sparse_offsets(bitmap.data_ptr(), rows, cols, offsets.data_ptr(), queue)
    return offsets


def _sparse_pack_fake(weight: Tensor, bitmap: Tensor, row_offsets: Tensor, kept: int) -> Tensor:
    return weight.new_empty(kept)


@_op(
    "sparse_pack(Tensor weight, Tensor bitmap, Tensor row_offsets, SymInt kept) -> Tensor",
    _sparse_pack_fake,
)
def sparse_pack(weight: Tensor, bitmap: Tensor, row_offsets: Tensor, kept: int) -> Tensor:
    """The ``kept`` weights whose bit is set, row by row, with their bits unchanged."""
    dtype = _dtype(weight, "weight")
    rows, cols = weight.shape
    _check(bitmap, "bitmap", torch.uint8, bitmap_shape(rows, cols))
    _check(row_offsets, "row_offsets", torch.int32, (rows + 1,))
    _same_device(weight.device, bitmap=bitmap, row_offsets=row_offsets)
    if weight.stride(1) != 1 or weight.stride(0) < cols:
        weight = weight.contiguous()
    _require(
        int(row_offsets[-1]) == kept, f"row_offsets must end at {kept}, not {int(row_offsets[-1])}."
    )
    values = _sparse_pack_fake(weight, bitmap, row_offsets, kept)
    backend, queue = _backend(weight.device)
    backend.sparse_pack(
        weight.data_ptr(), dtype, rows, cols, weight.stride(0), bitmap.data_ptr(),
        row_offsets.data_ptr(), values.data_ptr(), queue,
    )  # fmt: skip
    return values


def _check_sparse(bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int) -> int:
    """Number of rows of a sparse weight whose shapes, dtypes and devices agree."""
    rows = row_offsets.numel() - 1
    _require(rows > 0 and cols > 0, f"the shape must not be empty, not {(rows, cols)}.")
    _check(bitmap, "bitmap", torch.uint8, bitmap_shape(rows, cols))
    _check(row_offsets, "row_offsets", torch.int32, (rows + 1,))
    _dtype(values, "values")
    _require(values.dim() == 1 and values.is_contiguous(), "values must be a contiguous vector.")
    _same_device(bitmap.device, values=values, row_offsets=row_offsets)
    return rows


def _dequantize_sparse_rows(
    sparse: tuple[Tensor, Tensor, Tensor], cols: int, begin: int, end: int, out: Tensor
) -> None:
    """Writes rows [begin, end) as dense values into the first rows of ``out``."""
    bitmap, values, row_offsets = sparse
    backend, queue = _backend(out.device)
    backend.sparse_dequantize(
        bitmap.data_ptr(), values.data_ptr(), _DTYPES[values.dtype], row_offsets.data_ptr(),
        row_offsets.numel() - 1, cols, begin, end, out.data_ptr(), _DTYPES[out.dtype],
        out.stride(0), queue,
    )  # fmt: skip


def _sparse_dequantize_fake(
    bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int, dtype: torch.dtype
) -> Tensor:
    return bitmap.new_empty((row_offsets.shape[0] - 1, cols), dtype=dtype)


@_op(
    "sparse_dequantize(Tensor bitmap, Tensor values, Tensor row_offsets, int cols, "
    "ScalarType dtype) -> Tensor",
    _sparse_dequantize_fake,
)
def sparse_dequantize(
    bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight [out_features, in_features] of a sparse weight."""
    rows = _check_sparse(bitmap, values, row_offsets, cols)
    out = _sparse_dequantize_fake(bitmap, values, row_offsets, cols, dtype)
    _dtype(out, "dtype")
    _dequantize_sparse_rows((bitmap, values, row_offsets), cols, 0, rows, out)
    return out


# --- linear layers in packed form: what vq_linear and sparse_linear share -------------------------

GEMV_MAX_TOKENS: int = _cpu.vq_gemv_max_tokens

# Dense rows made at a time when many tokens come: enough for the GEMM to run at full speed, small
# beside a layer, so that no layer is ever whole in memory.
_TILE_BYTES = 8 << 20

DequantizeRows = Callable[[int, int, Tensor], None]


def _check_features(tensor: Tensor, what: str, features: int) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] != features:
        raise ValueError(
            f"{what} must have {features} features in its last dimension, "
            f"not shape {tuple(tensor.shape)}."
        )


def _check_linear(
    x: Tensor, bias: Tensor | None, rows: int, cols: int, device: torch.device
) -> tuple[Tensor, int, Tensor | None]:
    """(x, number of tokens, bias) of a linear layer: checked, x and bias contiguous."""
    _dtype(x, "x")
    _check_features(x, "x", cols)
    if x.device != device:
        raise ValueError(f"x must be on {device}, not on {x.device}.")
    if bias is not None:
        _same_device(device, bias=bias)
        bias = bias.contiguous()
        _check(bias, "bias", x.dtype, (rows,))
    return x.contiguous(), x.numel() // cols, bias


def _tile_rows(cols: int, dtype: torch.dtype) -> int:
    """Rows of a dense tile: whole code tiles, about _TILE_BYTES."""
    return max(1, _TILE_BYTES // (cols * dtype.itemsize * TILE_ROWS)) * TILE_ROWS


def _tiled_linear(x: Tensor, bias: Tensor | None, rows: int, dequantize: DequantizeRows) -> Tensor:
    """x W^T + bias by a dense GEMM on one tile of W's rows after another."""
    cols, dtype = x.shape[-1], gemm_dtype(x.dtype, x.device)
    inputs = x.view(-1, cols).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    outputs = inputs.new_empty((inputs.shape[0], rows))
    step = min(_tile_rows(cols, dtype), rows)
    tile = inputs.new_empty((step, cols))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        dequantize(begin, end, tile)
        weight = tile[: end - begin].t()
        if bias is None:
            torch.mm(inputs, weight, out=outputs[:, begin:end])
        else:
            torch.addmm(bias[begin:end], inputs, weight, out=outputs[:, begin:end])
    return outputs.to(x.dtype).view(*x.shape[:-1], rows)


def _tiled_linear_grad(grad_y: Tensor, cols: int, dequantize: DequantizeRows) -> Tensor:
    """grad_y W, the gradient of x, tile by tile; summed over tiles in float32."""
    rows, dtype = grad_y.shape[-1], gemm_dtype(grad_y.dtype, grad_y.device)
    outputs = grad_y.reshape(-1, rows).to(dtype)
    grad_x = grad_y.new_zeros((outputs.shape[0], cols), dtype=torch.float32)
    step = min(_tile_rows(cols, dtype), rows)
    tile = outputs.new_empty((step, cols))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        dequantize(begin, end, tile)
        grad_x += outputs[:, begin:end] @ tile[: end - begin]
    return grad_x.to(grad_y.dtype).view(*grad_y.shape[:-1], cols)


def _register_linear_autograd(
    linear: Any, linear_grad: Any, grad_settings: Callable[[Tensor], tuple[int, ...]]
) -> None:
    """Gradients of ``linear(x, *packed, bias)`` for x and bias, and of ``linear_grad`` for grad_y.

    ``linear_grad(grad_y, *packed, *grad_settings(x))`` is grad_y W. The packed weight is constant.
    """

    def setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:-1])
        ctx.settings = grad_settings(inputs[0])

    def backward_linear(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        packed, rows = ctx.saved_tensors, grad_y.shape[-1]
        wants = ctx.needs_input_grad
        grad_x = linear_grad(grad_y, *packed, *ctx.settings) if wants[0] else None
        grad_bias = grad_y.reshape(-1, rows).sum(0) if wants[-1] else None
        return (grad_x, *[None] * len(packed), grad_bias)

    def setup_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(value for value in inputs[1:] if isinstance(value, Tensor)))
        ctx.constants = len(inputs) - 1

    def backward_grad(ctx: Any, grad_grad_x: Tensor) -> tuple[Tensor | None, ...]:
        return (linear(grad_grad_x, *ctx.saved_tensors, None), *[None] * ctx.constants)

    register = torch.library.register_autograd
    register(linear.name(), backward_linear, setup_context=setup_linear, lib=_LIBRARY)
    register(linear_grad.name(), backward_grad, setup_context=setup_grad, lib=_LIBRARY)


# --- vq_gemv.h: vq_gemv, vq_linear ----------------------------------------------------------------

_VQ_SCHEMA = "Tensor codes, Tensor codebook, Tensor row_norms, Tensor col_norms"


def _vq_linear_fake(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    _check_features(x, "x", col_norms.shape[0])
    _same_device(codes.device, x=x, bias=bias)
    return x.new_empty((*x.shape[:-1], row_norms.shape[0]))


def _run_vq_gemv(
    x: Tensor,
    tokens: int,
    vq: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: _VqSizes,
    bias: Tensor | None,
) -> Tensor:
    rows, cols, d, code_bits = sizes
    y = x.new_empty((*x.shape[:-1], rows))
    codes, codebook, row_norms, col_norms = vq
    backend, queue = _backend(x.device)
    for begin in range(0, tokens, GEMV_MAX_TOKENS):
        offset = begin * x.element_size()
        backend.vq_gemv(
            x.data_ptr() + offset * cols, _DTYPES[x.dtype], min(tokens - begin, GEMV_MAX_TOKENS),
            codes.data_ptr(), codebook.data_ptr(), row_norms.data_ptr(), col_norms.data_ptr(),
            bias.data_ptr() if bias is not None else 0, rows, cols, d, code_bits,
            y.data_ptr() + offset * rows, queue,
        )  # fmt: skip
    return y


@_op(f"vq_gemv(Tensor x, {_VQ_SCHEMA}, Tensor? bias=None) -> Tensor", _vq_linear_fake)
def vq_gemv(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias by the few-token kernel: x [..., in_features], at most 16 tokens."""
    vq = (codes, codebook, row_norms, col_norms)
    sizes = _vq_sizes(*vq)
    x, tokens, bias = _check_linear(x, bias, sizes[0], sizes[1], codes.device)
    _require(
        tokens <= GEMV_MAX_TOKENS, f"vq_gemv takes at most {GEMV_MAX_TOKENS} tokens, not {tokens}."
    )
    return _run_vq_gemv(x, tokens, vq, sizes, bias)


def _vq_gemv_tokens(d: int, code_bits: int, x: Tensor) -> int:
    """Up to how many tokens the kernel, run for 16 at a time, beats dense tiles.

    Measured (benchmarks/bench_vq_gemv.py). The kernel's time is proportional to tokens and codes;
    torch's GEMM is several times faster in bf16 where the CPU has instructions for that.
    """
    narrow = code_bits <= 8
    if gemm_dtype(x.dtype, x.device) != torch.float32:
        return 2 * GEMV_MAX_TOKENS if narrow else GEMV_MAX_TOKENS
    if not x.is_cpu:
        return 4 * GEMV_MAX_TOKENS
    if narrow and d >= 4:
        return 16 * GEMV_MAX_TOKENS
    return 4 * GEMV_MAX_TOKENS if narrow or "avx512" in _cpu.simd_level() else 2 * GEMV_MAX_TOKENS


@_op(f"vq_linear(Tensor x, {_VQ_SCHEMA}, Tensor? bias=None) -> Tensor", _vq_linear_fake)
def vq_linear(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    row_norms: Tensor,
    col_norms: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias for x [..., in_features], any number of tokens; with gradients."""
    vq = (codes, codebook, row_norms, col_norms)
    sizes = _vq_sizes(*vq)
    x, tokens, bias = _check_linear(x, bias, sizes[0], sizes[1], codes.device)
    if tokens <= _vq_gemv_tokens(*sizes[2:], x):
        return _run_vq_gemv(x, tokens, vq, sizes, bias)
    return _tiled_linear(
        x,
        bias,
        sizes[0],
        lambda begin, end, out: _dequantize_vq_rows(vq, sizes, begin, end, out),
    )


def _vq_linear_grad_fake(
    grad_y: Tensor, codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor
) -> Tensor:
    return grad_y.new_empty((*grad_y.shape[:-1], col_norms.shape[0]))


@_op(f"vq_linear_grad(Tensor grad_y, {_VQ_SCHEMA}) -> Tensor", _vq_linear_grad_fake)
def vq_linear_grad(
    grad_y: Tensor, codes: Tensor, codebook: Tensor, row_norms: Tensor, col_norms: Tensor
) -> Tensor:
    """grad_y W, the gradient of vq_linear's x: grad_y [..., out_features]."""
    vq = (codes, codebook, row_norms, col_norms)
    sizes = _vq_sizes(*vq)
    rows, cols = sizes[:2]
    _dtype(grad_y, "grad_y")
    _check_features(grad_y, "grad_y", rows)
    _same_device(codes.device, grad_y=grad_y)
    return _tiled_linear_grad(
        grad_y,
        cols,
        lambda begin, end, out: _dequantize_vq_rows(vq, sizes, begin, end, out),
    )


_register_linear_autograd(vq_linear, vq_linear_grad, lambda x: ())


# --- sparse_gemv.h: sparse_gemv, sparse_linear ----------------------------------------------------

_SPARSE_SCHEMA = "Tensor bitmap, Tensor values, Tensor row_offsets"


def _sparse_linear_fake(
    x: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_offsets.shape[0] - 1))


def _run_sparse_gemv(
    x: Tensor, tokens: int, sparse: tuple[Tensor, Tensor, Tensor], rows: int, bias: Tensor | None
) -> Tensor:
    bitmap, values, row_offsets = sparse
    y = x.new_empty((*x.shape[:-1], rows))
    if tokens:
        backend, queue = _backend(x.device)
        backend.sparse_gemv(
            x.data_ptr(), _DTYPES[x.dtype], tokens, bitmap.data_ptr(), values.data_ptr(),
            _DTYPES[values.dtype], row_offsets.data_ptr(),
            bias.data_ptr() if bias is not None else 0, rows, x.shape[-1], y.data_ptr(), queue,
        )  # fmt: skip
    return y


@_op(f"sparse_gemv(Tensor x, {_SPARSE_SCHEMA}, Tensor? bias=None) -> Tensor", _sparse_linear_fake)
def sparse_gemv(
    x: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias by the few-token kernel: x [..., in_features], at most 16 tokens."""
    cols = x.shape[-1] if x.dim() else 0
    rows = _check_sparse(bitmap, values, row_offsets, cols)
    x, tokens, bias = _check_linear(x, bias, rows, cols, bitmap.device)
    _require(
        tokens <= GEMV_MAX_TOKENS,
        f"sparse_gemv takes at most {GEMV_MAX_TOKENS} tokens, not {tokens}.",
    )
    return _run_sparse_gemv(x, tokens, (bitmap, values, row_offsets), rows, bias)


@_op(f"sparse_linear(Tensor x, {_SPARSE_SCHEMA}, Tensor? bias=None) -> Tensor", _sparse_linear_fake)
def sparse_linear(
    x: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias for x [..., in_features], any number of tokens; with gradients."""
    cols = x.shape[-1] if x.dim() else 0
    sparse = (bitmap, values, row_offsets)
    rows = _check_sparse(*sparse, cols)
    x, tokens, bias = _check_linear(x, bias, rows, cols, bitmap.device)
    if tokens <= GEMV_MAX_TOKENS:
        return _run_sparse_gemv(x, tokens, sparse, rows, bias)
    return _tiled_linear(
        x,
        bias,
        rows,
        lambda begin, end, out: _dequantize_sparse_rows(sparse, cols, begin, end, out),
    )


def _sparse_linear_grad_fake(
    grad_y: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int
) -> Tensor:
    return grad_y.new_empty((*grad_y.shape[:-1], cols))


@_op(
    f"sparse_linear_grad(Tensor grad_y, {_SPARSE_SCHEMA}, SymInt cols) -> Tensor",
    _sparse_linear_grad_fake,
)
def sparse_linear_grad(
    grad_y: Tensor, bitmap: Tensor, values: Tensor, row_offsets: Tensor, cols: int
) -> Tensor:
    """grad_y W, the gradient of sparse_linear's x: grad_y [..., out_features]."""
    sparse = (bitmap, values, row_offsets)
    rows = _check_sparse(*sparse, cols)
    _dtype(grad_y, "grad_y")
    if grad_y.dim() == 0 or grad_y.shape[-1] != rows:
        raise ValueError(
            f"grad_y must have {rows} features in its last dimension, not {tuple(grad_y.shape)}."
        )
    _same_device(bitmap.device, grad_y=grad_y)
    return _tiled_linear_grad(
        grad_y,
        cols,
        lambda begin, end, out: _dequantize_sparse_rows(sparse, cols, begin, end, out),
    )


_register_linear_autograd(sparse_linear, sparse_linear_grad, lambda x: (x.shape[-1],))
