"""Activation norms of every linear layer of a model, in one pass over calibration text.

NoWag, section "calibration": act_norms[j] = sqrt(mean over tokens of X[t, j]^2). What is gathered,
stored and merged is the sum of squares (float64) and the number of tokens of each linear.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nowag_ext.decoder import check_tokens, decoder_linears
from nowag_ext.files import atomic_file, check_file
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.report import Progress
from nowag_ext.version import __version__

FILE_FORMAT = "nowag-calibration"
FILE_VERSION = "1"
_SQUARES = ".sum_squares"
_TOKENS = ".tokens"

_PIECE_ELEMENTS = 1 << 16  # 512 KiB of float64

TokenBatch = Tensor | Mapping[str, Tensor]


@dataclass
class CalibrationStatistics:
    """Sums that act_norms follow from; those of several texts or machines merge by addition.

    Attributes:
        sum_squares: by module name, float64 [in_features].
        tokens: by module name, how many tokens the sums are over.
    """

    sum_squares: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def act_norms(self) -> dict[str, Tensor]:
        """By module name, float32 [in_features]: sqrt(sum_squares / tokens)."""
        return {
            name: (squares / self.tokens[name]).sqrt().float()
            for name, squares in self.sum_squares.items()
        }

    def add(self, name: str, squares: Tensor, tokens: int) -> None:
        """Adds the float64 sums of ``tokens`` more tokens of one linear."""
        if name not in self.sum_squares:
            self.sum_squares[name] = squares.clone()
            self.tokens[name] = tokens
            return
        if squares.shape != self.sum_squares[name].shape:
            raise ValueError(
                f"{name} has {squares.numel()} inputs in one set of statistics and "
                f"{self.sum_squares[name].numel()} in the other: they are of different models."
            )
        self.sum_squares[name] += squares.to(self.sum_squares[name].device)
        self.tokens[name] += tokens

    def merge(self, *others: CalibrationStatistics) -> CalibrationStatistics:
        """The statistics of this text and the others together."""
        merged = CalibrationStatistics()
        for statistics in (self, *others):
            for name, squares in statistics.sum_squares.items():
                merged.add(name, squares, statistics.tokens[name])
        return merged

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored: ``<module>.sum_squares`` fp64, ``<module>.tokens`` int64."""
        tensors: dict[str, Tensor] = {}
        for name, squares in self.sum_squares.items():
            tensors[name + _SQUARES] = squares.cpu().contiguous()
            tensors[name + _TOKENS] = torch.tensor(
                self.tokens[name], dtype=torch.int64, device="cpu"
            )
        return tensors

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file of ``tensors()``.

        Raises:
            OSError: ``check_statistics_file`` refuses, or there is no room.
        """
        check_statistics_file(path)
        metadata = {"format": FILE_FORMAT, "format_version": FILE_VERSION, "nowag": __version__}
        with atomic_file(path) as temporary:
            temporary.write_bytes(save(self.tensors(), metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationStatistics:
        """Reads a file that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, or not a file of calibration statistics.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no calibration file {os.fspath(path)}.")
        try:
            with safe_open(path, framework="pt") as file:
                _check_metadata(path, file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{os.fspath(path)} is truncated or no safetensors file ({error})."
            ) from error
        return cls.of_tensors(path, tensors)

    @classmethod
    def of_tensors(
        cls, path: str | os.PathLike[str], tensors: Mapping[str, Tensor]
    ) -> CalibrationStatistics:
        """The inverse of ``tensors``; raises ValueError, with the path they are from."""
        statistics = cls()
        for key, squares in tensors.items():
            if key.endswith(_TOKENS):
                continue
            name = key.removesuffix(_SQUARES)
            tokens = tensors.get(name + _TOKENS)
            if tokens is None or squares.dtype != torch.float64 or squares.dim() != 1:
                raise ValueError(f"{os.fspath(path)} has no complete statistics of {name}.")
            statistics.add(name, squares, int(tokens))
        return statistics


def check_statistics_file(path: str | os.PathLike[str]) -> Path:
    """Where ``CalibrationStatistics.save`` will write: ``path`` with symbolic links followed.

    Raises:
        FileExistsError: there is a file that is none of statistics.
        OSError: it is a directory, a pipe or a device, or nothing can be written there.
    """
    target = check_file(path)
    if target.is_file() and target.stat().st_size > 0:
        try:
            with safe_open(target, framework="pt") as file:
                found = (file.metadata() or {}).get("format")
        except (OSError, SafetensorError):
            found = None
        if found != FILE_FORMAT:
            raise FileExistsError(
                f"{os.fspath(path)} exists and is no file of calibration statistics: choose "
                "another name."
            )
    return target


def _check_metadata(path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    if metadata.get("format") != FILE_FORMAT:
        raise ValueError(
            f"{os.fspath(path)} is not a file of calibration statistics: its metadata must say "
            f"format={FILE_FORMAT}."
        )
    if metadata.get("format_version") != FILE_VERSION:
        raise ValueError(
            f"{os.fspath(path)} has format_version {metadata.get('format_version')}, but this "
            f"nowag_ext {__version__} reads version {FILE_VERSION}: install the matching release."
        )


def load_act_norms(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """act_norms by module name, float32 [in_features], from a file of calibration statistics."""
    return CalibrationStatistics.load(path).act_norms()


class _Gatherer:
    """Forward pre-hooks that add each linear's inputs to the statistics."""

    def __init__(self, linears: Mapping[str, nn.Linear], statistics: CalibrationStatistics) -> None:
        self.statistics = statistics
        self.mask: Tensor | None = None
        self._sums: tuple[Tensor, int, Tensor, int] | None = None
        self._handles = [
            linear.register_forward_pre_hook(partial(self._hook, name), with_kwargs=True)
            for name, linear in linears.items()
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._sums = None

    def _hook(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs: Tensor = args[0] if args else kwargs["input"]
        squares, tokens = self._sum_squares(name, inputs)
        self.statistics.add(name, squares, tokens)

    def _sum_squares(self, name: str, inputs: Tensor) -> tuple[Tensor, int]:
        # Layers that read the same tensor (queries, keys and values, say) share one sum.
        if self._sums is not None:
            last, version, squares, tokens = self._sums
            if last is inputs and version == inputs._version:
                return squares, tokens
        rows = self._counted_rows(name, inputs)
        squares = column_squares(name, rows)
        self._sums = (inputs, inputs._version, squares, len(rows))
        return squares, len(rows)

    def _counted_rows(self, name: str, inputs: Tensor) -> Tensor:
        """[tokens, in_features]: the inputs at the positions that the attention mask keeps."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.mask is None:
            return rows
        if len(rows) != self.mask.numel():
            raise ValueError(
                f"{name} sees {len(rows)} of the batch's {self.mask.numel()} positions, so masked "
                "ones cannot be told apart: calibrate this model on batches without padding."
            )
        return rows[self.mask.to(rows.device).reshape(-1)]


def column_squares(name: str, rows: Tensor) -> Tensor:
    """Sums of squares, float64 [in_features], of what the linear ``name`` reads.

    In pieces whose float64 copies stay in cache.

    Raises:
        ValueError: rows [tokens, in_features] holds a NaN or an infinity.
    """
    squares = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    for piece in rows.split(max(1, _PIECE_ELEMENTS // rows.shape[1])):
        squares += piece.double().square().sum(0)
    if not torch.isfinite(squares).all():
        raise ValueError(
            f"the inputs of {name} must be finite, but input "
            f"{int((~torch.isfinite(squares)).nonzero()[0])} is NaN or infinite on this text: "
            "run the model in bfloat16 or float32."
        )
    return squares


@ordinary_tensors
def collect_statistics(
    model: nn.Module,
    token_batches: Iterable[TokenBatch],
    *,
    statistics: CalibrationStatistics | None = None,
    progress: Progress | None = None,
) -> CalibrationStatistics:
    """Runs the model over calibration text and sums the squares of every linear's inputs.

    Args:
        model: a Hugging Face causal LM; run in eval mode without gradients, left as it was.
        token_batches: token ids, int64 or int32 [batch, tokens], or mappings with ``input_ids`` and
            ``attention_mask`` (0 where a position does not count), as tokenizers give them.
        statistics: of earlier batches, to which these are added; None for none.
        progress: called after each batch with ("calibrate", batches done, batches in all or 0).

    Raises:
        ValueError: no linear layers, no batches, a batch of padding alone, ids outside the
            vocabulary, or an input that is NaN or infinite (the sentence names the module).
        TypeError: a batch that is not of integers.
    """
    linears = decoder_linears(model)
    if not linears:
        raise ValueError("the model has no nn.Linear in its decoder layers: nothing to calibrate.")
    body = getattr(model, "base_model", model)  # without the lm_head, whose inputs nobody needs
    modes = [(module, module.training) for module in model.modules()]
    total = float(len(token_batches)) if isinstance(token_batches, Sized) else 0.0
    gatherer = _Gatherer(linears, statistics or CalibrationStatistics())
    done = 0
    try:
        model.eval()
        for batch in token_batches:
            ids, mask = checked_batch(model, batch)
            gatherer.mask = None if mask is None or bool(mask.all()) else mask.bool()
            body(input_ids=ids, attention_mask=mask, use_cache=False)
            done += 1
            if progress is not None:
                progress("calibrate", done, total)
    finally:
        gatherer.remove()
        for module, training in modes:
            module.training = training
    if done == 0:
        raise ValueError("token_batches is empty: calibration needs at least one batch.")
    return gatherer.statistics


def calibrate(
    model: nn.Module, token_batches: Iterable[TokenBatch], *, progress: Progress | None = None
) -> dict[str, Tensor]:
    """act_norms of every linear of the decoder layers: float32 [in_features] by module name.

    ``collect_statistics(...).act_norms()``; see there for arguments and errors. Keep the
    statistics instead where they are to be saved or merged.
    """
    return collect_statistics(model, token_batches, progress=progress).act_norms()


def checked_windows(model: Any, tokens: Any) -> Tensor:
    """Text without padding, [windows, length], on the device of the model's embeddings."""
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"tokens must be a tensor of int64 or int32, not of type {type(tokens).__name__}."
        )
    return checked_batch(model, tokens)[0]


def checked_batch(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor | None]:
    """input_ids and attention_mask on the device of the model's embeddings."""
    mapping = isinstance(batch, Mapping)
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        where = "input_ids of a token batch" if mapping else "a token batch"
        raise TypeError(f"{where} must be a tensor of int64 or int32, not {kind}.")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"a token batch must have shape [batch, tokens], not {tuple(ids.shape)}.")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, "
            f"not {tuple(mask.shape)}."
        )
    if mask is not None and not mask.any():
        raise ValueError(
            f"attention_mask of a token batch of shape {tuple(ids.shape)} keeps no position: "
            "nothing but padding says nothing about the inputs."
        )
    check_tokens(model, ids)
    device = next(model.get_input_embeddings().parameters(recurse=False)).device
    return ids.to(device), None if mask is None else mask.to(device)
