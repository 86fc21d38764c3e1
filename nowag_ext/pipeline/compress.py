"""A model compressed block by block, every linear against what the ones before it have become.

Two streams of hidden states go through the model: one through dense blocks, one through the blocks
compressed so far. Each group of linears that read the same input is compressed under the Hessian of
that input in the compressed stream, towards what the dense stream would have (GPTQ's order; the
corrected targets are those of, for example, GPTAQ, Li et al., 2025).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nowag_ext.calibrate import checked_batch
from nowag_ext.decoder import decoder_linears
from nowag_ext.feedback import check_device
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.linear import PackedWeight
from nowag_ext.methods import Given, VQSettings
from nowag_ext.model import install, layer_report
from nowag_ext.pipeline.blocks import Blocks, Group
from nowag_ext.pipeline.codebooks import SharedCodebooks
from nowag_ext.pipeline.norms import activation_norms
from nowag_ext.pipeline.stages import Stages
from nowag_ext.pipeline.statistics import GroupStatistics
from nowag_ext.pipeline.streams import CompressedStream, Stream, embedded
from nowag_ext.plan import Plan, Unit, plan_compression
from nowag_ext.report import LayerReport, Progress
from nowag_ext.resume import LayerStore, open_store, run_key

# Activation norms serve to train codebooks and to check; for that few windows will do.
_NORM_WINDOWS = 4


@ordinary_tensors
def compress(
    model: Any,
    tokens: Tensor,
    method: str = "vq",
    ignore: Sequence[str] = ("lm_head",),
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    codebook_scope: str = "model",
    min_coverage: float = 0.8,
    work_dir: str | os.PathLike[str] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Any:
    """Compresses a causal LM's decoder layers block by block, with error feedback.

    At the same bits the error is less than half of ``compress_model``'s, which looks at every layer
    alone and at nothing but its activation norms. Everything is checked before work starts. The
    modules are replaced at the very end: after any exception, an interrupt included, the model is
    as it was.

    Args:
        model: a Hugging Face causal LM, dense. Changed in place. Layers that ``from_pretrained``
            has left on disk (its device_map) are read one at a time, and stay there.
        tokens: calibration text, int64 or int32 [windows, length], without padding. More text helps
            more than anything else; text like what the model will read helps most.
        method, ignore, overrides, min_coverage, settings: as for ``compress_model``. A codebook
            that is shared takes at most 30 iterations.
        work_dir: a directory for what is finished. The same run, interrupted, goes on from there
            and ends in the same bits (at the same number of threads); remove it when the model is
            saved. None: nothing is kept.
        offload_dir: a directory for the hidden states of the calibration text, twice 4 bytes a
            token and hidden unit, which are otherwise in memory. They leave nothing there.
        codebook_scope: which linears of method "vq" share a codebook: "model", all of them; "kind",
            those of one name (all down_proj, say); "layer", none.
        progress: called with (what is done, weights done, weights in all).

    Returns:
        The same model, with a ``nowag_report`` (ModelReport), ready for ``save_pretrained``.

    Raises:
        ValueError: unfit settings, layers, weights or tokens, or a model whose layers cannot be run
            one after another; the sentence names the layer.
        TypeError: a setting that the method does not have, tokens that are no integers.
    """
    start = time.perf_counter()
    stages = Stages()
    codebooks = SharedCodebooks(codebook_scope)

    def plan_with(norms: Mapping[str, Tensor]) -> Plan:
        return plan_compression(
            model, norms, (method, settings), ignore, overrides or {}, min_coverage,
            shared_codebooks=codebook_scope != "layer",
        )  # fmt: skip

    # Everything that is not of the norms is found out before they are measured.
    linears = decoder_linears(model).items()
    plan = plan_with({name: torch.ones(linear.in_features) for name, linear in linears})
    for unit in plan.units.values():
        if isinstance(unit.settings, VQSettings):
            check_device(unit.device)
    windows, _ = checked_batch(model, tokens)
    blocks = Blocks(model, windows.shape[1])
    with open_store(work_dir) as store:
        with stages("activation norms"):
            norms = activation_norms(blocks, windows[:_NORM_WINDOWS], progress)
        plan = plan_with(norms)
        codebooks.assign(plan.units)
        key = "" if store is None else run_key(
            plan.units, windows=windows, codebook_scope=codebook_scope
        )  # fmt: skip
        if not codebooks.load(store, key, windows.device):
            with stages("codebooks"):
                codebooks.train(plan.units, progress)
            with stages("re-estimation"):
                codebooks.re_estimate(plan.units, blocks, windows, progress)
            codebooks.save(store, key)
        run = _Run(plan, blocks, codebooks, stages, progress, store, key, offload_dir)
        run.through(windows)
    seconds = time.perf_counter() - start
    install(model, plan, run.weights, run.layers, seconds, stages.seconds, windows.numel())
    return model


class _Run:
    """One way through the model, and what has come of it so far."""

    def __init__(
        self,
        plan: Plan,
        blocks: Blocks,
        codebooks: SharedCodebooks,
        stages: Stages,
        progress: Progress | None,
        store: LayerStore | None,
        key: str,
        offload_dir: str | os.PathLike[str] | None,
    ) -> None:
        self.weights: dict[str, PackedWeight] = {}
        self.layers: list[LayerReport] = []
        self._plan, self._blocks = plan, blocks
        self._codebooks, self._stages, self._progress = codebooks, stages, progress
        self._store, self._key = store, key
        self._offload_dir = offload_dir
        self._total = float(sum(unit.size for unit in plan.units.values()))
        self._done = 0.0

    def through(self, windows: Tensor) -> None:
        """Compresses every unit of the plan."""
        with self._stages("forwards"):
            dense = Stream(embedded(self._blocks, windows, self._offload_dir))
            compressed = CompressedStream(embedded(self._blocks, windows, self._offload_dir))
        for index in range(len(self._blocks.layers)):
            self._layer(index, dense, compressed)

    def _layer(self, index: int, dense: Stream, compressed: CompressedStream) -> None:
        dense.blocks, compressed.blocks = (self._blocks.copied(index) for _ in range(2))
        weights = compressed.blocks.weights(index)
        groups = dense.blocks.groups(index, dense.hidden[:1])
        for stream in (dense, compressed):
            stream.enter(index, groups)
        for group in groups:
            here = {name: weights[name] for name in group.names if name in self._plan.units}
            if not here:
                continue
            finished = self._finished(here)
            if finished is None:
                finished = self._compress(self._given(index, group, here, dense, compressed))
            else:
                with self._stages("forwards"):
                    compressed.look(index, group)
            for name, packed in finished.items():
                weights[name].copy_(packed.dequantize(torch.float32))
            with self._stages("forwards"):
                compressed.replaced(index, group)
        self._check_reached(weights)
        with self._stages("forwards"):
            for stream in (dense, compressed):
                stream.advance(index)

    def _given(
        self,
        index: int,
        group: Group,
        weights: Mapping[str, Tensor],
        dense: Stream,
        compressed: Stream,
    ) -> dict[str, Given]:
        """What the linears of a group are compressed under, from both streams."""
        statistics = GroupStatistics(group.in_features, dense.hidden.device)
        for window in range(len(dense.hidden)):
            with self._stages("forwards"):
                wanted = dense.taps(index, window, group)
                given = compressed.taps(index, window, group)
            with self._stages("statistics"):
                statistics.add_pair(
                    wanted.inputs, given.inputs, wanted.sums, given.sums,
                    all_summed=None not in group.taps,
                )  # fmt: skip
        with self._stages("statistics"):
            hessian = statistics.hessian()
            corrections = statistics.corrections(weights)
        return {
            name: Given(hessian, corrections.get(name), self._codebooks.of(name))
            for name in weights
        }

    def _compress(self, given: Mapping[str, Given]) -> dict[str, PackedWeight]:
        finished = {}
        for name, one in given.items():
            unit = self._plan.units[name]
            began = time.perf_counter()
            packed = self._compress_unit(name, unit, one)
            seconds = time.perf_counter() - began
            finished[name] = packed
            if self._store is not None:
                self._store.put(name, self._key, packed, seconds)
                # From the file, whose pages need not stay in memory.
                stored = self._store.get(name, self._key, unit)
                finished[name] = packed if stored is None else stored[0]
            self._report(name, packed, seconds)
        return finished

    def _finished(self, names: Iterable[str]) -> dict[str, PackedWeight] | None:
        """A group's weights from an interrupted run, if all of them are there."""
        if self._store is None:
            return None
        stored = {}
        for name in names:
            one = self._store.get(name, self._key, self._plan.units[name])
            if one is None:
                return None
            stored[name] = one
        for name, (packed, seconds) in stored.items():
            self._report(name, packed, seconds, resumed=True)
        return {name: packed for name, (packed, _) in stored.items()}

    def _compress_unit(self, name: str, unit: Unit, given: Given) -> PackedWeight:
        size = unit.size
        assert given.hessian is not None
        norms = given.hessian.diagonal().clamp(min=0).sqrt()
        try:
            with self._stages("compression"):
                return unit.settings.compress(
                    unit.weight, norms,
                    lambda share: self._tell(name, share * size), given,
                )  # fmt: skip
        except Exception as error:
            raise RuntimeError(
                f"{name} could not be compressed, and the model is unchanged: {error}"
            ) from error

    def _tell(self, name: str, more: float) -> None:
        if self._progress is not None:
            self._progress(name, self._done + more, self._total)

    def _report(
        self, name: str, packed: PackedWeight, seconds: float, *, resumed: bool = False
    ) -> None:
        unit = self._plan.units[name]
        self.weights[name] = packed
        self.layers.append(layer_report(name, unit, packed, seconds, resumed=resumed))
        self._done += packed.shape[0] * packed.shape[1]
        self._tell(name, 0.0)

    def _check_reached(self, linears: Iterable[str]) -> None:
        """Raises for a linear that is in no group: experts that no token is routed to."""
        units = self._plan.units
        missing = [name for name in linears if name in units and name not in self.weights]
        if missing:
            raise RuntimeError(
                f"{missing[0]} was not reached by the calibration text, and the model is "
                "unchanged: give more text, or ignore the layer."
            )
