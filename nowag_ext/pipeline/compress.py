"""A model compressed block by block, every linear against what the ones before it have become.

Two streams of hidden states go through the model: one through dense blocks, one through the blocks
compressed so far. Each group of linears that read the same input is compressed under the Hessian of
that input in the compressed stream, towards what the dense stream would have (GPTQ's order; the
corrected targets are those of, for example, GPTAQ, Li et al., 2025). What is learnt from the text
must hold for other text: statistics.py says which tokens count less, and how that is damped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from nowag_ext.calibrate import checked_windows
from nowag_ext.decoder import decoder_linears
from nowag_ext.feedback import check_device
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.linear import PackedWeight
from nowag_ext.methods import METHODS, Given, VQSettings
from nowag_ext.model import PackedHead, install, layer_report
from nowag_ext.pipeline.blocks import Blocks, Group
from nowag_ext.pipeline.codebooks import SharedCodebooks
from nowag_ext.pipeline.head import Head
from nowag_ext.pipeline.head_weight import compress_head, head_statistics
from nowag_ext.pipeline.norms import activation_norms
from nowag_ext.pipeline.ranks import Ranks, common_groups
from nowag_ext.pipeline.stages import Stages
from nowag_ext.pipeline.statistics import GroupStatistics
from nowag_ext.pipeline.streams import CompressedStream, Stream, embedded
from nowag_ext.plan import Plan, Unit, plan_compression
from nowag_ext.plan_head import HeadPlan, head_settings, plan_head
from nowag_ext.report import LayerReport, Progress
from nowag_ext.resume import LayerStore, open_store, run_key
from nowag_ext.vq import VQWeight

# Activation norms serve to train codebooks and to check; for that few windows will do.
_NORM_WINDOWS = 4

# A compressed linear, and how many seconds it took.
_Made = tuple[PackedWeight, float]


@ordinary_tensors
def compress(
    model: Any,
    tokens: Tensor | None,
    method: str = "vq",
    ignore: Sequence[str] = ("lm_head",),
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    codebook_scope: str = "model",
    min_coverage: float = 0.8,
    work_dir: str | os.PathLike[str] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    head: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
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
        head: settings of method "vq", such as {"d": 2, "bits": 4}, for the lm_head and, where that
            is tied to it, the embedding. None: they stay dense.
        progress: called with (what is done, weights done, weights in all).
        group: processes that share the work, each of which makes this same call: windows and
            linears go over them. Rank 0 alone gives tokens (the others None) and a work_dir, and
            has the model changed; the others' stay as they are. Needs gloo, and nccl for a model on
            CUDA ("cpu:gloo,cuda:nccl"). Statistics are added up in an order that depends on the
            number of ranks alone, and all else is what one process would make of them.

    Returns:
        The same model, with a ``nowag_report`` (ModelReport), ready for ``save_pretrained``.

    Raises:
        ValueError: unfit settings, layers, weights or tokens, or a model whose layers cannot be run
            one after another; the sentence names the layer.
        TypeError: a setting that the method does not have, tokens that are no integers.
        RankLostError: another process of the group has ended.
    """
    start = time.perf_counter()
    stages = Stages()
    ranks = Ranks(group)
    codebooks = SharedCodebooks(codebook_scope, ranks)

    def plan_with(norms: Mapping[str, Tensor]) -> Plan:
        return plan_compression(
            model, norms, (method, settings), ignore, overrides or {}, min_coverage,
            shared_codebooks=codebook_scope != "layer",
        )  # fmt: skip

    head_plan = None if head is None else plan_head(model, head_settings(head))
    # Everything that is not of the norms is found out before they are measured.
    linears = decoder_linears(model).items()
    plan = plan_with({name: torch.ones(linear.in_features) for name, linear in linears})
    for unit in plan.units.values():
        if isinstance(unit.settings, VQSettings):
            check_device(unit.device)
    windows = _windows(model, tokens, ranks)
    blocks = Blocks(model, windows.shape[1])
    head_of = None if head_plan is None else Head(model, blocks, logits=False)
    with open_store(work_dir if ranks.first else None) as store:
        with stages("activation norms"):
            few = windows[: max(_NORM_WINDOWS, ranks.count)]
            norms = activation_norms(blocks, few, ranks, progress)
        plan = plan_with(norms)
        codebooks.assign(plan.units)
        key = "" if store is None else run_key(
            plan.units, windows=windows, codebook_scope=codebook_scope, processes=ranks.count,
            **_beside(model, plan.units),
        )  # fmt: skip
        if not codebooks.load(store, key, windows.device):
            with stages("codebooks"):
                codebooks.train(plan.units, windows.device, progress)
            with stages("re-estimation"):
                codebooks.re_estimate(plan.units, blocks, windows, progress)
            codebooks.save(store, key)
        run = _Run(plan, blocks, codebooks, ranks, stages, progress, store, key, offload_dir)
        streams = None
        if not run.was_finished(head_plan):
            streams = run.through(windows[ranks.share(len(windows))])
        packed_head = None
        if head_plan is not None and head_of is not None:
            packed_head = run.head(head_plan, head_of, streams)
    if ranks.first:
        seconds = time.perf_counter() - start
        layers = {layer.name: layer for layer in run.layers}
        install(
            model, plan, run.weights, [layers[name] for name in plan.units], seconds,
            stages.seconds, windows.numel(), packed_head,
        )  # fmt: skip
    return model


def _windows(model: Any, tokens: Tensor | None, ranks: Ranks) -> Tensor:
    """Rank 0's tokens [windows, length], checked."""
    given = {"windows": checked_windows(model, tokens)} if ranks.first else {}
    said, _ = ranks.tell((given, None))
    windows = said["windows"].to(model.get_input_embeddings().weight.device)
    if len(windows) < ranks.count:
        raise ValueError(
            f"{ranks.count} processes need a window of calibration text each, and there are only "
            f"{len(windows)}."
        )
    return windows


def _beside(model: Any, units: Mapping[str, Unit]) -> dict[str, Tensor]:
    """What results follow from beside the units: all other parameters that are in memory."""
    weights = {id(unit.linear.weight) for unit in units.values()}
    return {
        f"parameter {name}": parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in weights and not parameter.is_meta
    }


class _Run:
    """One way through the model, and what has come of it so far."""

    def __init__(
        self,
        plan: Plan,
        blocks: Blocks,
        codebooks: SharedCodebooks,
        ranks: Ranks,
        stages: Stages,
        progress: Progress | None,
        store: LayerStore | None,
        key: str,
        offload_dir: str | os.PathLike[str] | None,
    ) -> None:
        self.weights: dict[str, PackedWeight] = {}
        self.layers: list[LayerReport] = []
        self._plan, self._blocks = plan, blocks
        self._codebooks, self._ranks = codebooks, ranks
        self._stages, self._progress = stages, progress
        self._store, self._key = store, key
        self._offload_dir = offload_dir
        self._total = float(sum(unit.size for unit in plan.units.values()))
        self._done = 0.0

    def was_finished(self, head: HeadPlan | None) -> bool:
        """Takes up all that an interrupted run has finished, if nothing is left to be done."""
        there = head is None or self._stored_head(head) is not None
        return self._ranks.tell(({}, there))[1] and self._finished(self._plan.units) is not None

    def through(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Compresses every unit of the plan, under this rank's windows and the other ranks'.

        Returns what the last layer makes of this rank's windows, the dense one and the compressed.
        """
        with self._stages("forwards"):
            dense = Stream(embedded(self._blocks, windows, self._offload_dir))
            compressed = CompressedStream(embedded(self._blocks, windows, self._offload_dir))
        for index in range(len(self._blocks.layers)):
            self._layer(index, dense, compressed)
        return dense.hidden, compressed.hidden

    def _head_key(self, plan: HeadPlan) -> str:
        return f"{self._key} {plan.name} {plan.embedding} {asdict(plan.unit.settings)}"

    def _stored_head(self, plan: HeadPlan) -> _Made | None:
        if self._store is None:
            return None
        return self._store.get(plan.name, self._head_key(plan), plan.unit)

    def head(
        self, plan: HeadPlan, head: Head, streams: tuple[Tensor, Tensor] | None
    ) -> PackedHead | None:
        """The head, compressed by rank 0, from what the last layer of each stream has returned."""
        name, unit = plan.name, plan.unit
        made = self._stored_head(plan)
        resumed: bool = self._ranks.tell(({}, made is not None))[1]
        if not resumed:
            assert streams is not None
            with self._stages("statistics"):
                statistics = head_statistics(head, *streams, unit.shape[1])
                statistics.add_up(self._ranks)
            if self._ranks.first:
                began = time.perf_counter()
                with self._stages("head"):
                    weight = compress_head(unit, statistics, partial(self._tell_of_head, plan))
                made = weight, time.perf_counter() - began
                if self._store is not None:
                    self._store.put(name, self._head_key(plan), *made)
        if made is None:
            return None
        assert isinstance(made[0], VQWeight)
        return PackedHead(plan, made[0], layer_report(name, unit, *made, resumed=resumed))

    def _tell_of_head(self, plan: HeadPlan, share: float) -> None:
        if self._progress is not None:
            self._progress(plan.name, share * plan.unit.size, float(plan.unit.size))

    def _layer(self, index: int, dense: Stream, compressed: CompressedStream) -> None:
        copies = [self._blocks.copied(index) for _ in range(2)]
        weights = copies[1].weights(index)
        groups = common_groups(self._ranks, copies[0], index, dense.hidden)
        for stream, blocks in zip((dense, compressed), copies, strict=True):
            stream.enter(index, blocks, groups)
        for group in groups:
            here = {name: weights[name] for name in group.names if name in self._plan.units}
            if not here:
                continue
            finished = self._finished(here)
            if finished is None:
                finished = self._compress(index, group, here, dense, compressed)
            else:
                with self._stages("forwards"):
                    compressed.look(index, group)
            for name, packed in finished.items():
                weights[name].copy_(packed.dequantize(torch.float32))
                self._let_go(name)
            with self._stages("forwards"):
                compressed.replaced(index, group)
        self._check_reached(weights, groups)
        with self._stages("forwards"):
            for stream in (dense, compressed):
                stream.advance(index)

    def _compress(
        self,
        index: int,
        group: Group,
        weights: Mapping[str, Tensor],
        dense: Stream,
        compressed: Stream,
    ) -> dict[str, PackedWeight]:
        """The linears of a group, each compressed by one rank."""
        owners = self._ranks.owners({name: weight.numel() for name, weight in weights.items()})
        own = {name: one for name, one in weights.items() if owners[name] == self._ranks.rank}
        made: dict[str, _Made] = {}
        for name, given in self._given(index, group, own, dense, compressed).items():
            began = time.perf_counter()
            packed = self._compress_unit(name, given, sum(own[done].numel() for done in made))
            made[name] = packed, time.perf_counter() - began
        finished = {}
        for name in weights:
            packed, seconds = self._exchange(name, made.get(name), owners[name])
            if self._store is not None:
                self._store.put(name, self._key, packed, seconds)
            self._report(name, packed, seconds)
            finished[name] = packed
        return finished

    def _given(
        self,
        index: int,
        group: Group,
        weights: Mapping[str, Tensor],
        dense: Stream,
        compressed: Stream,
    ) -> dict[str, Given]:
        """What these linears of a group are compressed under, from both streams of all ranks."""
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
            statistics.add_up(self._ranks)
            hessian = statistics.hessian()
            corrections = statistics.corrections(weights)
        return {
            name: Given(hessian, corrections.get(name), self._codebooks.of(name))
            for name in weights
        }

    def _exchange(self, name: str, made: _Made | None, owner: int) -> _Made:
        """What one rank has made of a linear, on all of them."""
        if self._ranks.count == 1:
            assert made is not None
            return made
        message = None
        if made is not None:
            message = made[0].tensors(), {"weight": made[0].facts(), "seconds": made[1]}
        tensors, facts = self._ranks.tell(message, owner)
        unit = self._plan.units[name]
        weight = METHODS[unit.settings.method].weight(
            **tensors, **facts["weight"], shape=unit.shape
        )
        return weight.to(unit.device), facts["seconds"]

    def _let_go(self, name: str) -> None:
        """Keeps a finished weight in its file alone, until it is needed again."""
        unit = self._plan.units[name]
        if self._store is not None and unit.device.type == "cpu":
            stored = self._store.get(name, self._key, unit, check=False)
            if stored is not None:
                self.weights[name] = stored[0]

    def _finished(self, names: Iterable[str]) -> dict[str, PackedWeight] | None:
        """A group's weights from an interrupted run, if all of them are there."""
        stored = self._stored(names)
        if not self._ranks.tell(({}, stored is not None))[1]:
            return None
        finished = {}
        for name in names:
            one = None if stored is None else stored[name]
            finished[name], seconds = self._exchange(name, one, owner=0)
            self._report(name, finished[name], seconds, resumed=True)
        return finished

    def _stored(self, names: Iterable[str]) -> dict[str, _Made] | None:
        """What rank 0's store has of these linears, if it has them all."""
        if self._store is None:
            return None
        stored = {}
        for name in names:
            one = self._store.get(name, self._key, self._plan.units[name])
            if one is None:
                return None
            stored[name] = one
        return stored

    def _compress_unit(self, name: str, given: Given, before: int) -> PackedWeight:
        """Of a linear before which this rank has compressed so many weights of its group."""
        unit = self._plan.units[name]
        assert given.hessian is not None
        norms = given.hessian.diagonal().clamp(min=0).sqrt()
        try:
            with self._stages("compression"):
                return unit.settings.compress(
                    unit.weight, norms,
                    lambda share: self._tell(name, before + share * unit.size), given,
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
        if not self._ranks.first:
            return
        unit = self._plan.units[name]
        self.weights[name] = packed
        self.layers.append(layer_report(name, unit, packed, seconds, resumed=resumed))
        self._done += packed.shape[0] * packed.shape[1]
        self._tell(name, 0.0)

    def _check_reached(self, linears: Iterable[str], groups: Iterable[Group]) -> None:
        """Raises for a linear that is in no group: experts that no token is routed to."""
        reached = {name for group in groups for name in group.names}
        missing = [name for name in linears if name in self._plan.units and name not in reached]
        if missing:
            raise RuntimeError(
                f"{missing[0]} was not reached by the calibration text, and the model is "
                "unchanged: give more text, or ignore the layer."
            )
