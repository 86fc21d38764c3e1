"""Launches for gpu_model.py: those that ncu measured, and those of a kernel for any shape.

A kernel has one function, which mirrors its launcher's cut (csrc/cuda/vq/vq_gemv.cu) and returns a
Launch. Counts a code or a weight are those that ncu counted at 6cce1a7 for 11008 x 4096 (so said
"counted"), else arithmetic from the kernel's header. A new kernel is one more function, and a line
in predict.py.
"""

from __future__ import annotations

import math
from typing import Any

from gpu_model import Device, Launch

H100 = Device()
STEP, SLICES, BLOCK_ROWS = 8, 8, 128  # of vq_gemv_mma.cuh
MAX_SEGMENT, SET_TILES, LUT_STAGES = 64, 128, 4  # of vq_gemv_lut.cuh
GPCS = (16,) * 6 + (18,) * 2  # multiprocessors of which a cluster is made: assumed
MMA_TABLE_ROUNDS = 2  # codes, then the codebook into shared memory
L2_ROUND = H100.cached

# By kernel as ncu names it, in the order of counters.json: blocks an SM (ncu's occupancy limits),
# rounds, waits, bytes in flight a thread (0: enough). What the rounds are:
#   kmeans  slab, points, sums        lut      2 to begin, a stage each once both are used, sums
#   finish  sums, output              prepare  inputs, output
#   mma     codes, table, and inputs from L2 in each of 8 or 12 turns, sums
#   sparse  counts, bits, values, sums                dequantize  codes, entries
#   prune_sample  samples, atomics, 4 fences, 3 passes of the last block
#   prune_split   keys, atomics, list, sums
#   prune_finish  candidates, two barriers of the grid of 2 rounds each, bits
MEASURED: tuple[tuple[int, float, float, int], ...] = (
    (1, 3, 0, 0), (5, 3, 0, 0), (1, 3, 5, 0), (4, 2, 0, 8), (1, 3, 2, 0), (4, 2, 0, 8),
    (2, 2, 0, 0), (1, 3, 8 * L2_ROUND, 0), (4, 2, 0, 8), (2, 2, 0, 0), (1, 3, 12 * L2_ROUND, 0),
    (4, 2, 0, 8), (2, 2, 0, 0), (1, 3, 12 * L2_ROUND, 0), (4, 2, 0, 8), (2, 4, 0, 0), (8, 2, 0, 0),
    (8, 9, 0, 0), (4, 4, 0, 0), (4, 6, 0, 0),
)  # fmt: skip
WRITTEN = {"vq_dequantize_tiles<6 2>": 69.6, "prune_split<1>": 4.1}  # MB, by ncu


def measured(line: dict[str, Any], known: tuple[int, float, float, int]) -> Launch:
    """A launch of counters.json. Shares of a unit's peak, times the clocks, are its count."""
    notes = line["notes"]
    blocks_an_sm, rounds, waits, a_thread = known
    clocks = notes["instructions_m"] / (4 * notes["issue %"] / 100)
    on_sm = min(blocks_an_sm, math.ceil(notes["grid"] / H100.multiprocessors))
    return Launch(
        line["contender"], int(notes["grid"]), blocks_an_sm, rounds, notes["dram_read_mb"],
        WRITTEN.get(line["contender"], 0.0), on_sm * notes["block"] * a_thread,
        instructions=notes["instructions_m"], l1=clocks * notes["l1 %"] / 100,
        alu=clocks * notes["alu %"] / 100, tensor=clocks * notes["tensor %"] / 100,
        waits=waits,
    )  # fmt: skip


def tiles_of(rows: int) -> int:
    return math.ceil(rows / 32)


def cut_steps(pieces: int, positions: int, slices: int, most: int, end: float) -> tuple[int, int]:
    """(segments, turns of the busiest block), as cut_steps has it."""
    steps, blocks = math.ceil(positions / STEP), H100.multiprocessors
    best, least = (0, 0), math.inf
    for turns in range(1, most + 1):
        length = turns * slices
        count = math.ceil(steps / length)
        last = math.ceil((steps - (count - 1) * length) / slices)
        items = math.ceil(pieces * count / blocks)
        full = math.ceil(pieces * (count - 1) / blocks)
        work = full * turns + (items - full) * last + end * items
        if work <= least:
            best, least = (count, full * turns + (items - full) * last), work
    return best


def finish(rows: int, segments: int, tokens: int, residues: int, name: str = "finish") -> Launch:
    """vq_gemv_finish: partial sums, which the kernel before has left in L2; two loads a thread."""
    tiles = tiles_of(rows)
    blocks = math.ceil(tiles / (16 // residues)) * tokens
    warps = 16 * blocks
    on_sm = min(4, math.ceil(blocks / H100.multiprocessors))
    return Launch(
        name, blocks, 4, 2, 4e-6 * segments * tokens * tiles * 32, flight=on_sm * 512 * 8,
        in_l2=True, instructions=1e-6 * warps * (65 + 12 * segments / residues),
    )  # fmt: skip


def look_up(
    rows: int, cols: int, members: int = 1, stages: int = LUT_STAGES, tokens: int = 1
) -> list[Launch]:
    """One token, d = 6. Of ncu's counts 960 instructions and 160 clocks of L1 are a table's.

    Two tokens (arithmetic): 3 instructions more for 32 codes, twice a table's products.
    """
    positions, tiles = math.ceil(cols / 6), tiles_of(rows)
    sets = 1 if tiles <= SET_TILES else 4 // tokens
    pieces = members * math.ceil(tiles / (sets * SET_TILES))
    wanted = max(1, H100.multiprocessors // pieces)
    length = min(MAX_SEGMENT, math.ceil(positions / wanted))
    segments = math.ceil(positions / length)
    codes = members * rows * positions
    blocks = segments * pieces
    # A stage is 1 position, or 4 where a block has one set of sums.
    copies = math.ceil(length / (4 if sets == 1 else 1))
    waits = max(0, copies - stages + 1) / (stages - 1)
    a_code, a_table = (0.254, 960) if tokens == 1 else (0.254 + 3 / 32, 1900)
    lut = Launch(
        "vq_gemv_lut", blocks, 1, 3, 1.5e-6 * codes, waits=waits,
        instructions=1e-6 * (a_code * codes + blocks * (a_table * length + 3000)),
        l1=1e-6 * (0.185 * codes + blocks * (160 * length + 1500)),
    )  # fmt: skip
    return [lut, finish(members * rows, segments, tokens, 16)]


def multiply(rows: int, cols: int, d: int, tokens: int, members: int = 1) -> list[Launch]:
    """Up to 16 tokens by tensor cores. Counted a code, but for d = 6 at 8 tokens (arithmetic)."""
    positions = math.ceil(cols / d)
    pieces = members * math.ceil(rows / BLOCK_ROWS)
    segments, turns = cut_steps(pieces, positions, SLICES, 64, 1.0 if d == 4 else 0.25)
    octets = math.ceil(tokens / 8)
    codes = members * rows * positions
    instructions, l1, tensor = {
        (6, 1): (0.61, 0.42, 0.082), (6, 2): (0.726, 0.473, 0.142),
        (4, 1): (0.368, 0.098 if tokens < 8 else 0.114, 0.047), (4, 2): (0.534, 0.163, 0.094),
    }[d, octets]  # fmt: skip
    items = pieces * segments
    on_busiest = turns * H100.multiprocessors * BLOCK_ROWS * STEP * SLICES / codes
    blocks = min(items, H100.multiprocessors)
    scale = 1e-6 * codes * on_busiest * blocks / H100.multiprocessors
    prepare_blocks = math.ceil(math.ceil(positions / STEP) / 32) * octets * members
    prepare = Launch(
        "vq_gemv_prepare", prepare_blocks, 2, 2, instructions=6.5e-3 * prepare_blocks,
        l1=1e-3 * prepare_blocks * (1.3 if tokens == 1 else 3.0),
    )  # fmt: skip
    mma = Launch(
        "vq_gemv_mma", blocks, 1, MMA_TABLE_ROUNDS + 1,
        1e-6 * codes * (1.5 if d == 6 else 1.0), waits=turns * L2_ROUND,
        early=MMA_TABLE_ROUNDS, instructions=scale * instructions, l1=scale * l1,
        tensor=scale * tensor,
    )  # fmt: skip
    return [prepare, mma, finish(members * rows, segments, tokens, 4)]


def cut_for_clusters(pieces: int, positions: int, d: int) -> tuple[int, int, int]:
    """(blocks of a cluster, clusters, turns of the busiest block), as vq_gemv.cu has it."""
    steps, end = math.ceil(positions / STEP), 1.5 if d == 4 else 0.4
    best, least = (0, 0, 0), math.inf
    for size in range(1, 9):
        length = math.ceil(steps / size)
        if length > (150 if d == 4 else 80):  # what shared memory has room for
            continue
        at_once = sum(gpc // size for gpc in GPCS)
        items, turns = math.ceil(pieces / at_once), math.ceil(length / SLICES)
        if items * (turns + end) < least:
            best, least = (size, min(at_once, pieces), items * turns), items * (turns + end)
    return best


def in_clusters(rows: int, cols: int, d: int, tokens: int, members: int = 1) -> list[Launch]:
    """Up to 8 tokens in one kernel; counts a code are vq_gemv_mma's, d = 6 with one load less.

    Rounds: codes and table, inputs, and of each item its sums from the neighbours.
    """
    positions = math.ceil(cols / d)
    pieces = members * math.ceil(rows / BLOCK_ROWS)
    size, clusters, turns = cut_for_clusters(pieces, positions, d)
    codes = members * rows * positions
    instructions, l1, tensor = (
        (0.58, 0.37, 0.082) if d == 6 else (0.368, 0.098 if tokens < 8 else 0.114, 0.047)
    )
    blocks = size * clusters
    # As if all blocks did what the busiest does.
    scale = 1e-6 * turns * blocks * BLOCK_ROWS * STEP * SLICES
    items = math.ceil(pieces / clusters)
    return [
        Launch(
            "vq_gemv_cluster", blocks, 1, MMA_TABLE_ROUNDS + 1 + items * L2_ROUND,
            1e-6 * codes * (1.5 if d == 6 else 1.0),
            flight=512 * (24.0 if d == 6 else 48.0), instructions=scale * instructions,
            l1=scale * l1, tensor=scale * tensor,
        )
    ]  # fmt: skip


def batch(rows: int, cols: int, d: int, tokens: int) -> list[Launch]:
    """17 to 64 tokens, by the arithmetic of vq_gemv_batch.cuh; never measured."""
    positions = math.ceil(cols / d)
    pieces = math.ceil(rows / BLOCK_ROWS)
    segments, turns = cut_steps(pieces, positions, 4, 32, 1.0)
    tiles = max(2, math.ceil(tokens / 16))
    codes = turns * H100.multiprocessors * BLOCK_ROWS * STEP * 4  # as if all were the busiest
    gathers, tensor = (179, 42) if d == 6 else (48, 28)  # of 512 codes; the latter a tile of tokens
    operands = 12 if d == 6 else 8
    prepare = Launch("vq_gemv_prepare_batch", tiles * 16, 4, 4, 2e-6 * tokens * cols)
    product = Launch(
        "vq_gemv_batch", H100.multiprocessors, 1, MMA_TABLE_ROUNDS + 2,
        1e-6 * rows * positions * (1.5 if d == 6 else 1.0), early=MMA_TABLE_ROUNDS,
        waits=turns * L2_ROUND, l1=1e-6 * codes * (gathers + operands * tiles) / 512,
        instructions=1e-6 * codes * (8 + tiles * d / 2) / 64,
        tensor=1e-6 * codes * tensor * tiles / 512,
    )  # fmt: skip
    sums = 4e-6 * segments * tokens * rows
    add_blocks = math.ceil(rows / 1024) * tokens
    add = Launch("vq_gemv_add", add_blocks, 8, 3, sums, 2e-6 * tokens * rows, in_l2=True)
    return [prepare, product, add]


def dequantize(rows: int, cols: int, d: int) -> Launch:
    """vq_dequantize_strips: bytes of codes and weights, 55 instructions, 22 clocks for 256."""
    weights = 1e-6 * rows * cols
    return Launch(
        "vq_dequantize_strips", H100.multiprocessors * 2, 2, 3, weights * (1.5 / d if d == 6
        else 1.0 / d), 2 * weights, instructions=weights * 55 / 256, l1=weights * 22 / 256,
    )  # fmt: skip


def sparse(rows: int, cols: int) -> list[Launch]:
    """50 % at one token; counted a weight."""
    weights = 1e-6 * rows * cols
    return [
        Launch(
            "sparse_gemv_mma", math.ceil(rows / 16), 2, 4, weights * 1.127,
            instructions=weights * 0.398, l1=weights * 0.1545, alu=weights * 0.069,
        )
    ]  # fmt: skip


def assign(points: float = 2.797e6) -> Launch:
    """kmeans_mma, d = 6, K = 4096, as its header counts: 512 tiles for 64 points."""
    warps = points / 64e6
    return Launch(
        "kmeans_mma", 2732, 1, 3, 73.0, instructions=warps * 11_000, l1=warps * 1_800,
        alu=warps * 512 * 5.3, tensor=warps * 512 * 7,
    )  # fmt: skip


def seed(entries: int = 4096) -> Launch:
    """kmeans_plus_plus: two messages an entry, a store and a load in L2, and 2500 clocks."""
    return Launch(
        "kmeans_plus_plus", H100.multiprocessors, 1, entries * 2 * L2_ROUND,
        clocks=2500.0 * entries,
    )  # fmt: skip


def select() -> list[Launch]:
    """50 % of 4096 x 4096; the sample with one fence a block, the others counted."""
    return [
        Launch("prune_sample", 64, 8, 6, 4.3),
        Launch("prune_split", 1024, 4, 4, 67.2, 4.1, instructions=8.47, l1=1.7, alu=1.5),
        Launch("prune_finish", 528, 4, 6, 4.4, instructions=0.7, l1=0.2),
    ]
