"""Operands whose contents lie: they are refused, or answered from what there is; never beyond it.

Under .ci/sanitize each of these would end the process where a kernel reads or writes elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vq_cases import random_vq

from nowag_ext import ops

pytestmark = pytest.mark.kernel

# What a 32-bit place can claim to be; None stands for the truth.
PLACES = st.sampled_from([-(2**31), -(10**6), -1, 0, 1, 7, 10**6, 2**30, 2**31 - 1])
FLOATS = st.sampled_from([float("nan"), float("inf"), -float("inf"), -1.0, 1e38, -1e38, 1e-45, 0.0])
SEEDS = st.integers(0, 10**6)


def answers_or_refuses(call: Callable[[], Any]) -> None:
    with contextlib.suppress(ValueError):
        call()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(tensor: Tensor, draw: torch.Generator) -> Tensor:
    """Places of a tensor: one, a few or all."""
    count = [1, max(1, tensor.numel() // 5), tensor.numel()][
        int(torch.randint(3, (), generator=draw))
    ]
    return torch.randperm(tensor.numel(), generator=draw)[:count]


def sparse(rows: int, cols: int, density: float, dtype: torch.dtype, draw: torch.Generator) -> Any:
    W = torch.randn(rows, cols, generator=draw)
    W[torch.rand(rows, cols, generator=draw) > density] = 0
    bitmap = torch.zeros(ops.bitmap_shape(rows, cols), dtype=torch.uint8)
    for bit in range(8):
        kept = (W[:, bit::8] != 0).to(torch.uint8)
        bitmap[:, : kept.shape[1]] |= kept << bit
    offsets = ops.sparse_offsets(bitmap, cols)
    return (
        W.to(dtype),
        bitmap,
        offsets,
        ops.sparse_pack(W.to(dtype), bitmap, offsets, int(offsets[-1])),
    )


@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 200),
    density=st.sampled_from([0.02, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    place=PLACES,
    lie=st.sampled_from(["row_offsets", "bitmap", "values", "none"]),
    tokens=st.sampled_from([1, 3, 16, 20]),
    seed=SEEDS,
)
def test_sparse(
    rows: int, cols: int, density: float, dtype: torch.dtype, place: int, lie: str, tokens: int,
    seed: int,
) -> None:  # fmt: skip
    draw = generator(seed)
    W, bitmap, offsets, values = sparse(rows, cols, density, dtype, draw)
    if lie == "row_offsets":
        offsets[some(offsets, draw)] = place
    elif lie == "bitmap":
        bitmap.view(-1)[some(bitmap, draw)] = 255
    elif lie == "values":  # fewer than the others say
        values = values[: values.numel() // 2].clone()
    x = torch.randn(tokens, cols, generator=draw)
    packed = (bitmap, values, offsets)
    answers_or_refuses(lambda: ops.sparse_linear(x, *packed))
    answers_or_refuses(lambda: ops.sparse_gemv(x[:16], *packed))
    answers_or_refuses(lambda: ops.sparse_linear_grad(torch.ones(tokens, rows), *packed, cols))
    for out in (dtype, torch.float32):
        answers_or_refuses(lambda out=out: ops.sparse_dequantize(*packed, cols, out))
    answers_or_refuses(lambda: ops.sparse_pack(W, bitmap, offsets, values.numel()))
    answers_or_refuses(lambda: ops.sparse_offsets(bitmap, cols))
    answers_or_refuses(lambda: ops.prune_objective(W.float(), torch.ones(cols), bitmap))


def test_sparse_refusals_name_what_is_wrong() -> None:
    W, bitmap, offsets, values = sparse(6, 70, 0.5, torch.float32, generator(0))
    x, kept = torch.randn(2, 70), values.numel()
    for index, wrong in ((0, 1), (3, 10**6), (3, -1), (6, kept + 1)):
        lying = offsets.clone()
        lying[index] = wrong
        for call in (
            lambda o=lying: ops.sparse_gemv(x, bitmap, values, o),
            lambda o=lying: ops.sparse_linear(x.repeat(20, 1), bitmap, values, o),
            lambda o=lying: ops.sparse_dequantize(bitmap, values, o, 70, torch.float32),
        ):
            with pytest.raises(ValueError, match=f"row_offsets must ascend from 0 to .*, {kept};"):
                call()
    moved = offsets.clone()
    moved[3] = moved[2]
    with pytest.raises(ValueError, match="row_offsets must be the running popcount of bitmap's 70"):
        ops.sparse_pack(W, bitmap, moved, kept)
    bitmap[2, 8] |= 0x80  # past column 70
    with pytest.raises(ValueError, match="row_offsets must be the running popcount of bitmap's 70"):
        ops.sparse_pack(W, bitmap, ops.sparse_offsets(bitmap, 70), kept + 1)


def test_bits_past_the_last_column_are_not_packed() -> None:
    W, bitmap, offsets, values = sparse(6, 70, 0.5, torch.float32, generator(0))
    bitmap[:, 8] |= 0xC0
    assert torch.equal(ops.sparse_pack(W, bitmap, offsets, values.numel()), values)


def test_a_negative_importance_does_not_keep_pruning_busy() -> None:
    h = torch.ones(60)
    h[0] = -1
    with pytest.raises(ValueError, match="w and h must not hold NaN, and h nothing negative"):
        ops.prune_select(torch.randn(1, 60, generator=generator(1)), h, 60)


@given(
    entries=st.sampled_from([1, 5, 256, 1100, 2**15, 2**15 + 9, 2**16]),
    d=st.integers(1, 8),
    lie=st.sampled_from([0, 1, 3000, 2**15 - 1, 2**15, 2**16 - 1]),
    gaps=st.booleans(),
    seed=SEEDS,
)
def test_codes(entries: int, d: int, lie: int, gaps: bool, seed: int) -> None:
    draw = generator(seed)
    w, h = torch.randn(40, 4 * d + 1, generator=draw), torch.ones(5 * d)
    codebook = torch.randn(entries, d, generator=draw)
    codes = torch.zeros(40, 5, dtype=torch.uint16)
    sums = torch.zeros(entries, 2 * d + 1, dtype=torch.int64)
    memory = ([codebook.clone()], [torch.full((40, 5), 1e30)]) if gaps else (None, None)
    ops.kmeans_assign([w], [h], [codebook], [codes], [sums], 1.0, False, *memory)
    codes.view(torch.int16).view(-1)[some(codes, draw)] = lie - (2**16 if lie >= 2**15 else 0)
    before = codes.clone(), sums.clone()
    calls = (
        lambda: ops.kmeans_errors(w, h, codebook, codes),
        lambda: ops.kmeans_spread(w, h, codebook, codes, 1.0),
        lambda: ops.kmeans_assign([w], [h], [codebook], [codes], [sums], 1.0, True, *memory),
    )
    for call in calls:
        if lie < entries:
            call()
        else:
            with pytest.raises(ValueError, match=f"codes must be below .*, {entries}, but one is"):
                call()
            assert torch.equal(codes, before[0])
            assert torch.equal(sums, before[1])
    answers_or_refuses(lambda: ops.pack_codes(codes, 8))


@pytest.mark.parametrize("wrong", [-1, 16, 2**62, -(2**63)])
def test_chosen_entries(wrong: int) -> None:
    sums, codebook = torch.ones(16, 5, dtype=torch.int64), torch.randn(16, 2)
    assert ops.kmeans_merge_costs(sums, codebook, 1.0, torch.tensor([0, 15])).shape == (2,)
    assert ops.kmeans_merge_costs(sums, codebook, 1.0, torch.tensor([]).long()).shape == (0,)
    with pytest.raises(ValueError, match=f"chosen must be entries from 0 to 15, not {wrong}"):
        ops.kmeans_merge_costs(sums, codebook, 1.0, torch.tensor([3, wrong]))


@given(
    what=st.sampled_from(["w", "h", "codebook", "previous", "gaps", "sums"]),
    value=FLOATS,
    entries=st.sampled_from([3, 256, 1025, 1100, 4096]),
    d=st.integers(1, 8),
    seed=SEEDS,
)
def test_numbers_that_kmeans_cannot_use(
    what: str, value: float, entries: int, d: int, seed: int
) -> None:
    """They give codes that mean nothing, of entries that there are."""
    draw = generator(seed)
    w, h = torch.randn(100, 16 * d, generator=draw), torch.rand(16 * d, generator=draw)
    codebook = torch.randn(entries, d, generator=draw)
    previous, gaps = codebook.clone(), torch.rand(100, 16, generator=draw)
    codes = torch.zeros(100, 16, dtype=torch.uint16)
    sums = torch.zeros(entries, 2 * d + 1, dtype=torch.int64)
    if what == "sums":
        sums.view(-1)[some(sums, draw)] = 2**63 - 1
    else:
        lied = {"w": w, "h": h, "codebook": codebook, "previous": previous, "gaps": gaps}[what]
        lied.view(-1)[some(lied, draw)] = value
    memory = ([previous], [gaps])
    for warm in (False, True, True):
        ops.kmeans_assign([w], [h], [codebook], [codes], [sums], 1.0, warm, *memory)
        assert int(codes.to(torch.int32).max()) < entries
    ops.kmeans_errors(w, h, codebook, codes)
    ops.kmeans_spread(w, h, codebook, codes, 1.0)
    ops.kmeans_merge_costs(sums, codebook, 1.0, torch.tensor([0, entries - 1]))
    ops.kmeans_update(sums, 1.0, codebook)
    ops.kmeans_energy(w, h, d)
    for init in ("random", "kmeans++"):
        assert ops.kmeans_seed([w], [h], min(entries, 100), d, init, seed).shape[1] == d


@given(
    what=st.sampled_from(["x", "carried", "factor", "codebook", "sums"]),
    value=FLOATS,
    entries=st.sampled_from([5, 256, 1100]),
    seed=SEEDS,
)
def test_numbers_that_feedback_cannot_use(what: str, value: float, entries: int, seed: int) -> None:
    draw = generator(seed)
    operands = {
        "x": torch.randn(40, 12, generator=draw),
        "carried": torch.randn(40, 12, generator=draw),
        "factor": torch.randn(12, 12, generator=draw).triu(),
        "codebook": torch.randn(entries, 4, generator=draw),
    }
    codes = torch.zeros(40, 3, dtype=torch.uint16)
    sums = torch.zeros(entries, ops.feedback_sums_columns(4), dtype=torch.int64)
    if what == "sums":
        sums[:] = 2**63 - 1
    else:
        operands[what].view(-1)[some(operands[what], draw)] = value
    ops.kmeans_feedback(*operands.values(), codes, 1.0, sums)
    assert int(codes.to(torch.int32).max()) < entries


@given(
    what=st.sampled_from(["w", "h"]),
    value=FLOATS,
    rows=st.sampled_from([1, 33, 300]),
    cols=st.sampled_from([4, 60, 260]),
    share=st.floats(0, 1),
    seed=SEEDS,
)
def test_numbers_that_pruning_cannot_use(
    what: str, value: float, rows: int, cols: int, share: float, seed: int
) -> None:
    draw = generator(seed)
    w, h = torch.randn(rows, cols, generator=draw), torch.rand(cols, generator=draw)
    lied = w if what == "w" else h
    lied.view(-1)[some(lied, draw)] = value
    answers_or_refuses(lambda: ops.prune_select(w, h, int(share * w.numel())))
    answers_or_refuses(lambda: ops.prune_select_nm(w, h, 2, 4))
    answers_or_refuses(lambda: ops.normalize(w))


@given(
    d=st.integers(1, 8),
    bits=st.integers(1, 16),
    value=FLOATS,
    what=st.sampled_from([0, 1, 2, 3]),
    tokens=st.sampled_from([1, 3, 40]),
    seed=SEEDS,
)
def test_vq(d: int, bits: int, value: float, what: int, tokens: int, seed: int) -> None:
    """Every pattern of bits is a code; what pads the last tile is of no account."""
    draw = generator(seed)
    vq = [tensor.clone() for tensor in random_vq(37, 50, d, bits, seed % 100)]
    if what == 0:
        vq[0].random_(256, generator=draw)
    else:
        vq[what].view(-1)[some(vq[what], draw)] = value
    ops.vq_linear(torch.randn(tokens, 50, generator=draw), *vq)
    ops.vq_linear_grad(torch.randn(tokens, 37, generator=draw), *vq)
    ops.vq_dequantize(*vq, torch.float32)
    ops.vq_gather(torch.tensor([36, 0]), *vq, torch.float16)
    assert ops.unpack_codes(vq[0], 37).shape == (37, vq[0].shape[1])


def misaligned(tensor: Tensor) -> Tensor:
    """The same, but for where its elements begin."""
    moved = torch.frombuffer(
        bytearray(tensor.nbytes + 1), dtype=tensor.dtype, count=tensor.numel(), offset=1
    ).view(tensor.shape)
    return moved.copy_(tensor)


def operands_of_everything() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Every operation, with operands that it takes."""
    draw = generator(0)
    W, bitmap, offsets, values = sparse(6, 72, 0.5, torch.float32, draw)
    vq, x, bias = random_vq(37, 50, 4, 2, 0), torch.randn(2, 50), torch.randn(37)
    w, h, codebook = torch.randn(40, 12, generator=draw), torch.ones(12), torch.randn(16, 4)
    codes, gaps = torch.zeros(40, 3, dtype=torch.uint16), torch.zeros(40, 3)
    sums = torch.ones(16, 9, dtype=torch.int64)
    of_feedback = torch.zeros(16, ops.feedback_sums_columns(4), dtype=torch.int64)

    def assign(*tensors: Tensor) -> Tensor:
        w, h, codebook, codes, sums, previous, gaps = ([tensor] for tensor in tensors)
        return ops.kmeans_assign(w, h, codebook, codes, sums, 1.0, True, previous, gaps)

    return {
        "vq_gemv": (ops.vq_gemv, [x, *vq, bias]),
        "vq_gemv_group": (
            lambda x, *t: ops.vq_gemv_group(x, *([one] for one in t)), [x, *vq, bias]
        ),
        "vq_linear": (ops.vq_linear, [x, *vq, bias]),
        "vq_linear of many": (lambda *t: ops.vq_linear(x.repeat(400, 1), *t), [*vq, bias]),
        "vq_dequantize": (lambda *t: ops.vq_dequantize(*t, torch.bfloat16), [*vq]),
        "vq_gather": (
            lambda *t: ops.vq_gather(*t, torch.float32), [torch.tensor([36, 0, 5]), *vq]
        ),
        "sparse_gemv": (ops.sparse_gemv, [W[:2].clone(), bitmap, values, offsets, torch.ones(6)]),
        "sparse_linear": (
            lambda *t: ops.sparse_linear(W.repeat(9, 1), *t), [bitmap, values, offsets]
        ),
        "sparse_dequantize": (
            lambda *t: ops.sparse_dequantize(*t, 72, torch.float32), [bitmap, values, offsets]
        ),
        "sparse_pack": (lambda *t: ops.sparse_pack(*t, values.numel()), [W, bitmap, offsets]),
        "pack_codes": (lambda c: ops.pack_codes(c, 4), [codes]),
        "normalize": (ops.normalize, [w]),
        "prune_select": (lambda *t: ops.prune_select(*t, 9), [w, h]),
        "kmeans_assign": (assign, [w, h, codebook, codes, sums, codebook.clone(), gaps]),
        "kmeans_update": (lambda s, c: ops.kmeans_update(s, 1.0, c), [sums, codebook]),
        "kmeans_errors": (ops.kmeans_errors, [w, h, codebook, codes]),
        "kmeans_merge_costs": (
            lambda s, c, chosen: ops.kmeans_merge_costs(s, c, 1.0, chosen),
            [sums, codebook, torch.tensor([3])],
        ),
        "kmeans_seed": (lambda w, h: ops.kmeans_seed([w], [h], 4, 4, "kmeans++", 0), [w, h]),
        "kmeans_feedback": (
            lambda *t: ops.kmeans_feedback(*t[:-1], 1.0, t[-1]),
            [w.clone(), torch.zeros(40, 12), torch.eye(12), codebook, codes, of_feedback],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", operands_of_everything())
def test_elements_that_begin_anywhere(name: str) -> None:
    call, operands = operands_of_everything()[name]
    call(*operands)  # whatever is remembered of these shapes
    for index, operand in enumerate(operands):
        if operand.element_size() == 1:
            continue
        moved = [misaligned(o) if i == index else o for i, o in enumerate(operands)]
        before = [o.clone() for o in moved]
        with pytest.raises(
            ValueError, match=r"must begin at a multiple of the \d bytes of an elem"
        ):
            call(*moved)
        for now, then in zip(moved, before, strict=True):
            assert torch.equal(now, then)
    bytewise = [misaligned(o) if o.element_size() == 1 else o for o in operands]
    call(*bytewise)
