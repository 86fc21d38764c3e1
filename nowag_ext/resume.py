"""Finished layers of a compression, on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nowag_ext import ops
from nowag_ext.codebook import OWNER, Codebook
from nowag_ext.files import atomic_file
from nowag_ext.linear import PackedWeight
from nowag_ext.methods import METHODS, Settings
from nowag_ext.version import __version__


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
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_key(settings: Mapping[str, Settings], weights: Mapping[str, Tensor], **rest: Any) -> str:
    """A digest of all that the results of a whole run follow from, whatever order it goes in.

    Args:
        settings, weights: by layer.
        rest: what else matters, as JSON can say it, or tensors.
    """
    tensors = {name: value for name, value in rest.items() if isinstance(value, Tensor)}
    identity = {
        "nowag_ext": __version__,
        "format_version": ops.FORMAT_VERSION,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "layers": {name: [one.method, asdict(one)] for name, one in settings.items()},
        **{name: value for name, value in rest.items() if name not in tensors},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name, tensor in {**weights, **tensors}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class LayerStore:
    """A directory of finished layers, one safetensors file each, written whole or not at all.

    A file counts only for the key it was written under: after a change of settings, weights or
    calibration the layer is done again and the file replaced.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def put(self, name: str, key: str, weight: PackedWeight, seconds: float) -> None:
        facts = {"weight": weight.facts(), "seconds": seconds}
        metadata = {"key": key, "facts": json.dumps(facts)}
        tensors = {part: tensor.cpu() for part, tensor in weight.tensors().items()}
        with atomic_file(self._path(name)) as temporary:
            save_file(tensors, temporary, metadata)

    def put_codebooks(self, key: str, codebooks: Mapping[str, Codebook]) -> None:
        """Keeps the codebooks that layers share."""
        tensors = {name: codebook.entries.cpu() for name, codebook in codebooks.items()}
        with atomic_file(self._path(OWNER)) as temporary:
            save_file(tensors, temporary, {"key": key})

    def get_codebooks(self, key: str, device: torch.device) -> dict[str, Codebook] | None:
        """The codebooks of this key, or None if they are to be trained."""
        try:
            with safe_open(self._path(OWNER), framework="pt") as file:
                if (file.metadata() or {}).get("key") != key:
                    return None
                names = list(file.keys())
                return {name: Codebook(file.get_tensor(name).to(device), name) for name in names}
        except (FileNotFoundError, SafetensorError):
            return None

    def get(
        self, name: str, key: str, settings: Settings, like: Tensor
    ) -> tuple[PackedWeight, float] | None:
        """The layer's compressed weight and the seconds it took, or None if it is to be done.

        ``like`` is the dense weight: its shape and device are the result's.
        """
        try:
            with safe_open(self._path(name), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != key:
                    return None
                tensors = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None
        facts = json.loads(metadata["facts"])
        weight = METHODS[settings.method].weight(
            **tensors, **facts["weight"], shape=(like.shape[0], like.shape[1])
        )
        return weight.to(like.device), facts["seconds"]
