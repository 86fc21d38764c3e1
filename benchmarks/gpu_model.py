"""What a kernel takes on a GPU, from a few counts that are known before it runs.

    microseconds = start + chain + units

start   what a launch alone takes under ncu; in a graph an edge instead.
chain   memory rounds that wait for one another, times a latency: of a block, for every wave of
        blocks; where several share a multiprocessor they wait together.
units   the busy times of DRAM, L1, issue, ALU and tensor cores, and of a stream that has too few
        bytes on their way, on the multiprocessor with most blocks. They overlap in part: p-norm,
        where p = 1 is one after another and a large p the longest alone.

Two constants are fitted, latency and p. `start` is the least that ncu's small launches take outside
of the clocks in which multiprocessors are active; `dram` and `edge` are of results/h100/units.json;
`l2` and `cached` are assumed, not measured: errors are the same for 4 TB/s, and for 0.3 or 0.5.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """An H100. L2 answers in `cached` of a DRAM latency, and reads at `l2` bytes a microsecond."""

    multiprocessors: int = 132
    clock: float = 1980.0  # a microsecond; linears on tensor cores and half kept ran at 1820
    dram: float = 3.0e6  # bytes a microsecond
    l2: float = 5.5e6
    cached: float = 0.4
    edge: float = 1.13  # of a graph, 132 blocks
    start: float = 2.0
    latency: float = 0.95
    norm: float = 2.0


@dataclass(frozen=True)
class Launch:
    """What is known of a launch. Counts are of the whole launch, in millions.

    l1, alu and tensor are clocks that a multiprocessor's unit is busy, added up over all of them;
    instructions are of warps. `flight`: bytes an SM has on their way, 0 where they are enough.
    `waits`: rounds within the loop, for what was asked for one turn ahead, or none: other warps, or
    the turn's own work, go on meanwhile, so that they count as a unit and not in the chain.
    `early`: rounds that run before the kernel waits for the one before it in a chain.
    """

    name: str
    blocks: int
    blocks_an_sm: int
    rounds: float
    read: float = 0.0  # MB
    written: float = 0.0
    flight: float = 0.0
    in_l2: bool = False  # what is read
    instructions: float = 0.0
    l1: float = 0.0
    alu: float = 0.0
    tensor: float = 0.0
    waits: float = 0.0
    early: float = 0.0
    clocks: float = 0.0  # of instructions that wait for one another, beside the rounds

    def share(self, device: Device) -> float:
        """Work of the busiest multiprocessor, as a multiple of the mean over all."""
        most = math.ceil(self.blocks / device.multiprocessors)
        return most * device.multiprocessors / self.blocks

    def waves(self, device: Device) -> float:
        at_once = device.multiprocessors * self.blocks_an_sm
        return max(1.0, math.ceil(self.blocks / at_once) / self.blocks_an_sm)


def units(launch: Launch, device: Device) -> dict[str, float]:
    """Microseconds that each unit is busy."""
    on_one = 1e6 * launch.share(device) / (device.multiprocessors * device.clock)
    rate = device.l2 if launch.in_l2 else device.dram
    found = {
        "dram": 1e6 * (launch.read / rate + launch.written / device.dram),
        "l1": on_one * launch.l1,
        "issue": on_one * launch.instructions / 4,
        "alu": on_one * launch.alu,
        "tensor": on_one * launch.tensor,
    }
    if launch.waits:
        found["waits"] = launch.waits * launch.waves(device) * device.latency
    if launch.flight:
        wait = device.latency * (device.cached if launch.in_l2 else 1.0)
        found["flight"] = 1e6 * launch.read / device.multiprocessors / launch.flight * wait
    return found


def chain_of(launch: Launch, device: Device, early: float = 0.0) -> float:
    rounds = launch.rounds * launch.waves(device) - early
    return rounds * device.latency + launch.clocks / device.clock


def alone(launch: Launch, device: Device) -> float:
    """Microseconds as ncu has them: one launch from cold caches."""
    together = sum(time**device.norm for time in units(launch, device).values())
    return device.start + chain_of(launch, device) + together ** (1 / device.norm)


def in_graph(launches: Sequence[Launch], device: Device) -> float:
    """Microseconds of a chain of programmatic launches in a graph: one edge, no early rounds."""
    total = device.edge
    for i, launch in enumerate(launches):
        total += alone(launch, device) - device.start
        total -= min(launch.early, launch.rounds) * device.latency if i else 0.0
    return total


def bound(launch: Launch, device: Device) -> str:
    """The largest part of its time."""
    parts = {
        **units(launch, device), "start": device.start, "chain": chain_of(launch, device)
    }  # fmt: skip
    return max(parts, key=lambda part: parts[part])


# --- the fit --------------------------------------------------------------------------------------

LATENCIES = [0.5 + 0.05 * i for i in range(17)]
NORMS = [1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0]
GRID = list(itertools.product(LATENCIES, NORMS))


@dataclass(frozen=True)
class Fit:
    device: Device
    left_out: list[float]  # modelled / measured, by constants fitted to all other kernels


def fitted(launches: Sequence[Launch], measured: Sequence[float]) -> Fit:
    """The constants with the least squares of log(modelled / measured)."""
    candidates = [Device(latency=round(latency, 2), norm=norm) for latency, norm in GRID]
    errors = [
        [
            math.log(alone(launch, device) / time)
            for launch, time in zip(launches, measured, strict=True)
        ]
        for device in candidates
    ]
    sums = [sum(error**2 for error in row) for row in errors]
    best = min(range(len(sums)), key=sums.__getitem__)
    kernels = [launch.name.partition("<")[0] for launch in launches]
    left_out = []
    for i, kernel in enumerate(kernels):
        others = [j for j, name in enumerate(kernels) if name != kernel]
        other = min(errors, key=lambda row, others=others: sum(row[j] ** 2 for j in others))
        left_out.append(math.exp(other[i]))
    return Fit(candidates[best], left_out)


def off(ratio: float) -> float:
    """How far off a ratio is, the same for half and for twice: 0.25 is a quarter."""
    return max(ratio, 1 / ratio) - 1


def median_off(ratios: Sequence[float]) -> float:
    return statistics.median(map(off, ratios))
