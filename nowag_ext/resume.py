"""What a run has finished, on disk, so that it goes on where it was after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nowag_ext import ops
from nowag_ext.calibrate import CalibrationStatistics
from nowag_ext.codebook import OWNER, Codebook
from nowag_ext.files import MARK, atomic_file, directories, remove
from nowag_ext.linear import PackedWeight
from nowag_ext.methods import METHODS, Settings
from nowag_ext.plan import Unit
from nowag_ext.version import __version__

# What a store's files say they are, the file that a run holds while it writes to the directory, and
# that which says what run it is.
_FORMAT = "nowag_ext finished layer"
_LOCK = f"{MARK}lock"
_MADE_WITH = f"{MARK}made_with.json"
_STATISTICS = "statistics"
_STATE = "state"
_TEXT = "text"
_SAMPLES = f"{MARK}samples"


def layer_key(settings: Settings, weight: Tensor, act_norms: Tensor) -> str:
    """A digest of all that a layer's result follows from."""
    identity = {
        "nowag_ext": __version__,
        "format_version": ops.FORMAT_VERSION,
        "method": settings.method,
        "settings": asdict(settings),
        "shape": list(weight.shape),
        "dtype": str(weight.dtype),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for tensor in (weight, act_norms.double()):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_key(units: Mapping[str, Unit], **rest: Any) -> str:
    """A digest of all that the results of a whole run follow from, whatever order it goes in.

    Args:
        units: by layer.
        rest: what else matters, as JSON can say it, or tensors.
    """
    tensors = {name: value for name, value in rest.items() if isinstance(value, Tensor)}
    identity = {
        "nowag_ext": __version__,
        "format_version": ops.FORMAT_VERSION,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "layers": {
            name: [unit.settings.method, asdict(unit.settings)] for name, unit in units.items()
        },
        **{name: value for name, value in rest.items() if name not in tensors},
    }
    weights = ((name, unit.weight) for name, unit in units.items())
    return _digest(identity, chain(weights, tensors.items()))


def state_key(tensors: Iterable[Tensor], facts: Any) -> str:
    """A digest of all that the state of an optimisation follows from; ``facts`` are for JSON."""
    identity = {
        "nowag_ext": __version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "facts": facts,
    }
    return _digest(identity, (("", tensor) for tensor in tensors))


def _digest(identity: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def work_directory(output: Path) -> Path:
    """Where what is finished of an output is kept until that is whole: beside it, on one disk.

    In it, hidden, if it is a mounted disk's root or nothing can be written beside it.
    """
    inside = os.path.ismount(output) or not os.access(output.parent, os.W_OK)
    if output.is_dir() and inside:
        return output / f"{MARK}partial"
    return output.with_name(f"{output.name}.partial")


@contextmanager
def open_store(
    directory: str | os.PathLike[str] | LayerStore | None,
) -> Iterator[LayerStore | None]:
    """The store of a directory, which no other run writes to meanwhile; None for none.

    One that is open already stays as it is. At the end a directory that keeps nothing goes.

    Raises:
        ValueError: another run has it open.
        OSError: it cannot be made.
    """
    if directory is None or isinstance(directory, LayerStore):
        yield directory
        return
    path = Path(directory)
    with directories(path):
        lock = FileLock(path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run keeps its finished layers in {path}: wait for it, or choose another "
                "directory."
            ) from None
        store = LayerStore(path)
        try:
            yield store
        finally:
            if not store.keeps_something():
                clear_store(path)
            lock.release()


def clear_store(directory: str | os.PathLike[str]) -> None:
    """Removes what a store has written there, and the directory if nothing else is in it."""
    path = Path(directory)
    for file in (*path.glob("*.safetensors"), *path.glob(f"{MARK}*")):
        if file.name.startswith(MARK) or _metadata(file) is not None:
            remove(file)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a file that a store has written, or None if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return metadata if metadata.get("format") == _FORMAT else None


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def _checksum(tensors: Mapping[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class LayerStore:
    """A directory of finished layers, one safetensors file each, written whole or not at all.

    A file counts only for the key it was written under, and if its contents are what was written:
    after a change of settings, weights or calibration, or damage, the layer is done again and the
    file replaced. Other files in the directory are left alone.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def keeps_something(self) -> bool:
        """Whether there is anything to go on from."""
        return any(_metadata(file) is not None for file in self.directory.glob("*.safetensors"))

    def clear(self) -> None:
        """Forgets what is kept; the directory stays this run's."""
        for file in self.directory.glob("*.safetensors"):
            if _metadata(file) is not None:
                file.unlink(missing_ok=True)

    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))

    def begin(self, made_with: Mapping[str, Any]) -> None:
        """Notes what the run is made with, by the names of its options.

        Raises:
            ValueError: what is kept was made with something else; the sentence names it.
        """
        file = self.directory / _MADE_WITH
        wanted: dict[str, Any] = json.loads(json.dumps(made_with))
        known = self._made_with() if self.keeps_something() else None
        if known is not None:
            other = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
            if other:
                raise ValueError(
                    f"{self.directory} was made with "
                    + ", ".join(f"{name} {_shown(known.get(name))}" for name in other)
                    + ", not "
                    + ", ".join(f"{name} {_shown(wanted.get(name))}" for name in other)
                    + f": pass the same, remove {self.directory}, or start anew "
                    "with resume=False (--no-resume)."
                )
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")

    def _made_with(self) -> dict[str, Any] | None:
        try:
            known = json.loads((self.directory / _MADE_WITH).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return known if isinstance(known, dict) else None

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _write(self, name: str, key: str, tensors: dict[str, Tensor], facts: Any) -> None:
        tensors = {part: tensor.cpu() for part, tensor in tensors.items()}
        said = json.dumps(facts)
        metadata = {
            "format": _FORMAT, "key": key, "facts": said, "checksum": _checksum(tensors, said)
        }  # fmt: skip
        with atomic_file(self._path(name)) as temporary:
            temporary.write_bytes(save(tensors, metadata))

    def _read(
        self, name: str, key: str, *, check: bool = True
    ) -> tuple[dict[str, Any], Any] | None:
        path = self._path(name)
        metadata = _metadata(path)
        if metadata is None or metadata.get("key") != key:
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
        facts = metadata.get("facts", "")
        if check and _checksum(tensors, facts) != metadata.get("checksum"):
            return None
        return tensors, json.loads(facts)

    def put(self, name: str, key: str, weight: PackedWeight, seconds: float) -> None:
        """Keeps a finished layer, and how long it took."""
        self._write(name, key, weight.tensors(), {"weight": weight.facts(), "seconds": seconds})

    def put_statistics(self, key: str, statistics: CalibrationStatistics, windows: int) -> None:
        """Keeps calibration statistics of the first windows."""
        self._write(_STATISTICS, key, statistics.tensors(), windows)

    def get_statistics(self, key: str) -> tuple[CalibrationStatistics, int]:
        """The statistics of this key, and of how many windows they are."""
        found = self._read(_STATISTICS, key)
        if found is None:
            return CalibrationStatistics(), 0
        return CalibrationStatistics.of_tensors(self._path(_STATISTICS), found[0]), found[1]

    def put_state(self, key: str, tensors: Mapping[str, Tensor], facts: Any) -> None:
        """Keeps how far an optimisation has come."""
        self._write(_STATE, key, dict(tensors), facts)

    def get_state(self, key: str) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and facts of this key, or None if it has to begin."""
        return self._read(_STATE, key)

    def put_text(self, key: str, tokens: Tensor) -> None:
        """Keeps windows of text that a model has written."""
        self._write(_TEXT, key, {"tokens": tokens}, None)

    def get_text(self, key: str) -> Tensor | None:
        """The windows of this key, if there are any."""
        found = self._read(_TEXT, key)
        return None if found is None else found[0]["tokens"]

    def put_samples(self, samples: int) -> None:
        """Notes how many windows of text the run has decided to read."""
        with atomic_file(self.directory / _SAMPLES) as temporary:
            temporary.write_text(str(samples), encoding="utf-8")

    def get_samples(self) -> int | None:
        """How many windows those were that what is kept follows from, if anything is kept."""
        if not self.keeps_something():
            return None
        try:
            return int((self.directory / _SAMPLES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put_codebooks(self, key: str, codebooks: Mapping[str, Codebook]) -> None:
        """Keeps the codebooks that layers share."""
        self._write(OWNER, key, {name: one.entries for name, one in codebooks.items()}, None)

    def get_codebooks(self, key: str, device: torch.device) -> dict[str, Codebook] | None:
        """The codebooks of this key, or None if they are to be trained."""
        found = self._read(OWNER, key)
        if found is None:
            return None
        return {name: Codebook(entries.to(device), name) for name, entries in found[0].items()}

    def get(
        self, name: str, key: str, unit: Unit, *, check: bool = True
    ) -> tuple[PackedWeight, float] | None:
        """The layer's compressed weight and the seconds it took, or None if it is to be done.

        On the CPU its tensors are the file's, mapped into memory, which is not read yet unless
        there is to be a ``check`` of what it holds.
        """
        found = self._read(name, key, check=check)
        if found is None:
            return None
        tensors, facts = found
        weight = METHODS[unit.settings.method].weight(
            **tensors, **facts["weight"], shape=unit.shape
        )
        return weight.to(unit.device), facts["seconds"]
