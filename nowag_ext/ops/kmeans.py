"""kmeans.h: weighted k-means over sub-vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nowag_ext import _cpu
from nowag_ext.ops.checks import check, require, same_device
from nowag_ext.ops.format import MAX_CODE_BITS, MAX_SUBVECTOR, code_positions
from nowag_ext.ops.registry import backend_of, cpu_threads, operation


def kmeans_scale(points_weight: float, largest: float = 1.0) -> float:
    """The power of two that fixed-point sums are multiplied by (kmeans.h).

    ``points_weight`` is the sum of h over all points and coordinates, ``largest`` bounds |x|.
    """
    return 2.0 ** (61 - math.ceil(math.log2(points_weight * max(1.0, largest))))


# The fields of KmeansProblem.
_Problem = tuple[int, int, int, int, int, int, int, int, int]


def _problems(
    w: Sequence[Tensor],
    h: Sequence[Tensor],
    d: int,
    codebooks: Sequence[Tensor] = (),
    codes: Sequence[Tensor] = (),
    sums: Sequence[Tensor] = (),
    previous: Sequence[Tensor] = (),
    gaps: Sequence[Tensor] = (),
) -> list[_Problem]:
    """Checks a batch of k-means problems; returns the addresses and sizes of KmeansProblem."""
    require(len(w) > 0 and len(w) == len(h), "w and h must be lists of the same length, not empty.")
    require(1 <= d <= MAX_SUBVECTOR, f"d must be from 1 to {MAX_SUBVECTOR}, not {d}.")
    named = {
        "codebooks": codebooks, "codes": codes, "sums": sums, "previous": previous, "gaps": gaps,
    }  # fmt: skip
    for name, tensors in named.items():
        require(
            len(tensors) in (0, len(w)), f"{name} must have one tensor a problem, or none at all."
        )
    entries = codebooks[0].shape[0] if codebooks else 0
    rows_of_addresses: list[_Problem] = []
    for index in range(len(w)):
        require(
            w[index].dim() == 2 and w[index].numel() > 0,
            f"w must be a non-empty matrix, not of shape {tuple(w[index].shape)}.",
        )
        rows, cols = w[index].shape
        positions = code_positions(cols, d)
        check(w[index], "w", torch.float32, (rows, cols))
        check(h[index], "h", torch.float32, (positions * d,))
        operands = [w[index], h[index]]
        if codebooks:
            check(codebooks[index], "codebook", torch.float32, (entries, d))
        if codes:
            check(codes[index], "codes", torch.uint16, (rows, positions))
        if sums:
            check(sums[index], "sums", torch.int64, (entries, 2 * d + 1))
        if previous:
            check(previous[index], "previous", torch.float32, (entries, d))
        if gaps:
            check(gaps[index], "gaps", torch.float32, (rows, positions))
        optional = [tensors[index] if tensors else None for tensors in named.values()]
        for tensor in (*operands, *optional):
            same_device(w[0].device, tensor=tensor)
        at = [tensor.data_ptr() if tensor is not None else 0 for tensor in optional]
        rows_of_addresses.append(
            (
                w[index].data_ptr(), h[index].data_ptr(), at[0], at[1], at[2], rows, cols,
                at[3], at[4],
            )
        )  # fmt: skip
    return rows_of_addresses


def _check_codes(codes: Tensor, entries: int) -> None:
    """Raises unless every code is an entry: kernels that read codes trust them (kmeans.h)."""
    if entries >= 2**MAX_CODE_BITS:
        return
    # Torch reduces int16 in vectors, and uint16 not at all. Half the codes are negative then; below
    # a number of entries they all are not, or the larger type has to do.
    signed = codes.view(torch.int16) if entries <= 2**15 else codes.to(torch.int32)
    least, most = (int(end) for end in torch.aminmax(signed))
    largest = most if least >= 0 else least + 2**16
    require(
        least >= 0 and most < entries,
        f"codes must be below the number of entries, {entries}, but one is {largest}.",
    )


def _kmeans_assign_fake(w: Sequence[Tensor], *_: Any, **__: Any) -> Tensor:
    return w[0].new_empty(len(w), dtype=torch.int64)


@operation(
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
    require(len(codebooks) > 0, "codebooks must not be empty.")
    entries, d = codebooks[0].shape
    most = 2**MAX_CODE_BITS
    require(1 <= entries <= most, f"a codebook has 1 to {most} entries, not {entries}.")
    problems = _problems(w, h, d, codebooks, codes, sums, previous or (), gaps or ())
    if warm:
        for previous_codes in codes:
            _check_codes(previous_codes, entries)
    changed = _kmeans_assign_fake(w)
    backend, queue = backend_of(w[0].device)
    backend.kmeans_assign(problems, entries, d, scale, warm, changed.data_ptr(), queue)
    return changed


def kmeans_assign_exhaustive(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor) -> None:
    """Nearest entry of every sub-vector of a matrix on the CPU, by looking at every entry.

    A yardstick for tests and benchmarks: ``kmeans_assign`` gives the same codes sooner.
    """
    entries, d = codebook.shape
    problems = _problems([w], [h], d, [codebook], [codes])
    changed = torch.empty(1, dtype=torch.int64)
    _cpu.kmeans_assign_exhaustive(
        problems, entries, d, 1.0, False, changed.data_ptr(), cpu_threads()
    )


def _kmeans_update_fake(sums: Tensor, scale: float, codebook: Tensor) -> tuple[Tensor, Tensor]:
    return codebook.new_empty((), dtype=torch.float64), codebook.new_empty(
        codebook.shape[0], dtype=torch.bool
    )


@operation(
    "kmeans_update(Tensor sums, float scale, Tensor(a!) codebook) -> (Tensor, Tensor)",
    _kmeans_update_fake,
)
def kmeans_update(sums: Tensor, scale: float, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Moves entries to their means in place: (objective_drop fp64 [], empty bool [K])."""
    entries, d = codebook.shape
    check(codebook, "codebook", torch.float32, (entries, d))
    check(sums, "sums", torch.int64, (entries, 2 * d + 1))
    same_device(codebook.device, sums=sums)
    drop, empty = _kmeans_update_fake(sums, scale, codebook)
    backend, queue = backend_of(codebook.device)
    backend.kmeans_update(
        sums.data_ptr(), entries, d, scale, codebook.data_ptr(), drop.data_ptr(),
        empty.data_ptr(), queue,
    )  # fmt: skip
    return drop, empty


def _kmeans_errors_fake(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    return w.new_empty(codes.shape, dtype=torch.float32)


@operation(
    "kmeans_errors(Tensor w, Tensor h, Tensor codebook, Tensor codes) -> Tensor",
    _kmeans_errors_fake,
)
def kmeans_errors(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """Weighted squared error of every sub-vector under its assigned entry, fp32 [rows, P]."""
    entries, d = codebook.shape
    problems = _problems([w], [h], d, [codebook], [codes])
    _check_codes(codes, entries)
    errors = _kmeans_errors_fake(w, h, codebook, codes)
    backend, queue = backend_of(w.device)
    backend.kmeans_errors(problems, entries, d, errors.data_ptr(), queue)
    return errors


def _kmeans_spread_fake(
    w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, scale: float
) -> Tensor:
    return w.new_empty(codebook.shape, dtype=torch.int64)


@operation(
    "kmeans_spread(Tensor w, Tensor h, Tensor codebook, Tensor codes, float scale) -> Tensor",
    _kmeans_spread_fake,
)
def kmeans_spread(w: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, scale: float) -> Tensor:
    """Weighted squared error of every entry by coordinate, times the scale, int64 [K, d]."""
    entries, d = codebook.shape
    problems = _problems([w], [h], d, [codebook], [codes])
    _check_codes(codes, entries)
    spread = _kmeans_spread_fake(w, h, codebook, codes, scale)
    backend, queue = backend_of(w.device)
    backend.kmeans_spread(problems, entries, d, scale, spread.data_ptr(), queue)
    return spread


def _kmeans_merge_costs_fake(
    sums: Tensor, codebook: Tensor, scale: float, chosen: Tensor
) -> Tensor:
    return codebook.new_empty(chosen.shape, dtype=torch.float32)


@operation(
    "kmeans_merge_costs(Tensor sums, Tensor codebook, float scale, Tensor chosen) -> Tensor",
    _kmeans_merge_costs_fake,
)
def kmeans_merge_costs(sums: Tensor, codebook: Tensor, scale: float, chosen: Tensor) -> Tensor:
    """What giving up each of the entries chosen, int64 [n] below K, adds to the objective: [n]."""
    entries, d = codebook.shape
    check(codebook, "codebook", torch.float32, (entries, d))
    check(sums, "sums", torch.int64, (entries, 2 * d + 1))
    check(chosen, "chosen", torch.int64, (chosen.numel(),))
    same_device(codebook.device, sums=sums, chosen=chosen)
    if chosen.numel():
        least, most = (int(end) for end in torch.aminmax(chosen))
        require(
            least >= 0 and most < entries,
            f"chosen must be entries from 0 to {entries - 1}, not {least if least < 0 else most}.",
        )
    costs = _kmeans_merge_costs_fake(sums, codebook, scale, chosen)
    backend, queue = backend_of(codebook.device)
    backend.kmeans_merge_costs(
        sums.data_ptr(), codebook.data_ptr(), entries, d, scale, chosen.data_ptr(),
        chosen.numel(), costs.data_ptr(), queue,
    )  # fmt: skip
    return costs


def _kmeans_energy_fake(w: Tensor, h: Tensor, d: int) -> Tensor:
    return w.new_empty((), dtype=torch.float64)


@operation("kmeans_energy(Tensor w, Tensor h, int d) -> Tensor", _kmeans_energy_fake)
def kmeans_energy(w: Tensor, h: Tensor, d: int) -> Tensor:
    """sum of h x^2 over all points, fp64 []: the denominator of the relative objective."""
    problems = _problems([w], [h], d)
    energy = _kmeans_energy_fake(w, h, d)
    backend, queue = backend_of(w.device)
    backend.kmeans_energy(problems, d, energy.data_ptr(), queue)
    return energy


_INITS = {"random": _cpu.init_random, "kmeans++": _cpu.init_plus_plus}


def _kmeans_seed_fake(
    w: Sequence[Tensor], h: Sequence[Tensor], entries: int, d: int, init: str, seed: int
) -> Tensor:
    return w[0].new_empty((entries, d), dtype=torch.float32)


@operation(
    "kmeans_seed(Tensor[] w, Tensor[] h, int entries, int d, str init, int seed) -> Tensor",
    _kmeans_seed_fake,
)
def kmeans_seed(
    w: Sequence[Tensor], h: Sequence[Tensor], entries: int, d: int, init: str, seed: int
) -> Tensor:
    """A starting codebook, fp32 [entries, d], from the points of all problems together."""
    require(init in _INITS, f"init must be one of {sorted(_INITS)}, not {init!r}.")
    problems = _problems(w, h, d)
    points = sum(matrix.shape[0] * code_positions(matrix.shape[1], d) for matrix in w)
    require(
        1 <= entries <= points,
        f"a codebook of {entries} entries needs at least as many sub-vectors, but there are "
        f"{points}.",
    )
    codebook = _kmeans_seed_fake(w, h, entries, d, init, seed)
    backend, queue = backend_of(w[0].device)
    backend.kmeans_seed(problems, entries, d, _INITS[init], seed, codebook.data_ptr(), queue)
    return codebook
