"""The processes ("ranks") that share one run: windows and linears go over them, one tells of it.

The second half is about torchrun, which starts them. A process that it has not started is alone, a
group of one rank, for which nothing here does or costs anything.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist

from nowag_ext.environment import named_device
from nowag_ext.pipeline.blocks import Blocks, Group

# Tensors by name, and what JSON can say besides.
Message = tuple[dict[str, Any], Any]

_FACTS = ".facts"  # the tensor of a message that is its JSON

# Seconds between looks at whether the others are done: signals come through in between.
_POLL = 0.001

# A rank may wait for as long as another works. That the other has died shows by its connections,
# which are closed then, not by a time limit.
_LONGEST_WAIT = timedelta(days=1)

# Seconds that other ranks give rank 0 to say why a run ends.
_PATIENCE = 5.0


class RankLostError(RuntimeError):
    """Another process of the run has ended before its time."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has ended, and this one with it: what it said is above, "
            "or it was killed."
        )


class Ranks:
    """The ranks of a process group, of which this process is one.

    Each method is called by all of them, in the same order. The same number of ranks adds up in the
    same order: sums, and all that follows from them, are the same again, and the same on each rank.

    Args:
        group: None for this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.count = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and reports."""
        return self.rank == 0

    def share(self, things: int) -> slice:
        """Which of so many things in order are this rank's: as many as any other's, or one more."""
        return slice(things * self.rank // self.count, things * (self.rank + 1) // self.count)

    def owners(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The rank that each thing is for: the largest first, each to whoever has least so far."""
        loads = [0] * self.count
        owners = {}
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += sizes[name]
        return owners

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes, in place, the sum of all ranks' ones."""
        if self.count > 1:
            for tensor in tensors:
                self._together(partial(dist.all_reduce, tensor))

    def tell(self, message: Message | None = None, source: int = 0) -> Message:
        """What rank ``source`` says, on all ranks; to the others its tensors come on the CPU."""
        if self.count > 1:
            message = self._tell(message if self.rank == source else None, source)
        assert message is not None
        return message

    def _tell(self, message: Message | None, source: int) -> Message:
        data = b""
        if message is not None:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in message[0].items()}
            facts = json.dumps([list(tensors), message[1]]).encode()
            data = save({**tensors, _FACTS: _bytes_tensor(facts)})
        broadcast = partial(dist.broadcast, group_src=source)
        size = torch.tensor([len(data)], dtype=torch.int64)
        self._together(partial(broadcast, size))
        body = _bytes_tensor(data or bytes(int(size)))
        self._together(partial(broadcast, body))
        if message is not None:
            return message
        tensors = load(body.numpy().tobytes())  # in an order of its own
        names, said = json.loads(tensors[_FACTS].numpy().tobytes())
        return {name: tensors[name] for name in names}, said

    def _together(self, exchange: Callable[..., Any]) -> None:
        """Begins an exchange and waits for its end, with an ear to signals."""
        work = exchange(group=self._group, async_op=True)
        try:
            while not work.is_completed():
                time.sleep(_POLL)
            work.wait()
        except RuntimeError as error:
            raise RankLostError from error


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


ALONE = Ranks()


def common_groups(ranks: Ranks, blocks: Blocks, index: int, hidden: Tensor) -> list[Group]:
    """``Blocks.groups`` of rank 0's first window, on all ranks."""
    known = blocks.known_groups
    if index not in known:
        found = blocks.groups(index, hidden[:1]) if ranks.first else []
        _, said = ranks.tell(({}, [asdict(group) for group in found]))
        known[index] = [
            Group(**{name: _as_tuple(value) for name, value in one.items()}) for one in said
        ]
    return known[index]


def _as_tuple(value: Any) -> Any:
    """JSON has lists alone."""
    return tuple(value) if isinstance(value, list) else value


@contextmanager
def threads_of_all() -> Iterator[None]:
    """For this rank the threads of all that are on its host, while they wait for it.

    What kernels give does not depend on that; torch's operations round otherwise.
    """
    before = torch.get_num_threads()
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if launched() > 1 else 1
    torch.set_num_threads(before * here)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- under torchrun -------------------------------------------------------------------------------


def launched() -> int:
    """How many processes torchrun has started, on all hosts; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def launched_rank() -> int:
    """Which of them this one is."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


def own_device(name: str) -> torch.device:
    """The device of a name (``named_device``); of "cuda" each of a host's processes has its own."""
    place = named_device(name)
    if launched() == 1 or place.type == "cpu" or ":" in name:
        return place
    return torch.device(place.type, _local_device())


def _local_device() -> int:
    return int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()


def launcher() -> list[str]:
    """How torchrun was started, as far as that is known."""
    hosts = os.environ["GROUP_WORLD_SIZE"]
    several = ["--nnodes", hosts, "..."] if hosts != "1" else []
    here = os.environ["LOCAL_WORLD_SIZE"]
    # Without the "--" Python 3.11's torchrun takes our --d for the beginning of an option of its.
    return ["torchrun", *several, "--nproc-per-node", here, "-m", "--", "nowag_ext"]


@cache
def _store() -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://"))
    return store


@contextmanager
def process_group() -> Iterator[dist.ProcessGroup | None]:
    """That of all processes which torchrun has started, once all are here; None without it."""
    if launched() == 1:
        yield None
        return
    store, rank = _store(), launched_rank()
    store.set(f"here {rank}", "")
    # Not in the store's own wait, which no signal ends: a rank may have found an error by now.
    while not store.check([f"here {other}" for other in range(launched())]):
        time.sleep(_POLL)
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda:
        torch.cuda.set_device(_local_device())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", store), rank=rank, world_size=launched(),
        timeout=_LONGEST_WAIT,
    )  # fmt: skip
    yield dist.group.WORLD
    # After an error the connections stay until this process ends, once it has said why.
    dist.destroy_process_group()


@contextmanager
def one_voice() -> Iterator[None]:
    """Of torchrun's processes one alone says why a run ends: rank 0, or if it cannot, another.

    What the others print is held back, and shown only if they end with an error and rank 0 does not
    within seconds. They end after it: torchrun terminates the rest once one has ended so, and that
    must not keep this one from speaking. To be open for as long as a process has anything to say.
    """
    if launched() == 1:
        yield
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if launched_rank() == 0:
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):
                _store().set("said", "")
            raise
        return
    held = io.StringIO()
    try:
        with redirect_stderr(held), redirect_stdout(io.StringIO()):
            yield
    except BaseException as stop:
        failed = not isinstance(stop, SystemExit) or stop.code not in (None, 0)
        if failed and not _may_speak():
            raise SystemExit(1) from None
        if failed:
            sys.stderr.write(held.getvalue())
        raise


def _may_speak() -> bool:
    """Whether rank 0 has not said anything within seconds, and no other rank has begun to."""
    end = time.monotonic() + _PATIENCE
    try:
        while time.monotonic() < end:
            if _store().check(["said"]):
                return False
            time.sleep(10 * _POLL)
        return _store().add("speakers", 1) == 1
    except RuntimeError:  # whoever had the store is gone
        return True


def spoken_for() -> bool:
    """Whether another of torchrun's processes has said why the run ends."""
    if launched() == 1:
        return False
    with suppress(RuntimeError):
        return _store().check(["speakers"])
    return False
