"""What a compression will cost in memory and time, from a model's outline alone.

Memory is added up from what is alive at once; time is counted operations over speeds that are
measured on this machine, for a second or two, at the model's own sizes. Groups of linears that read
the same input are guessed from names and shapes: linears of one parent and one number of inputs,
where the last, if it gives hidden states, writes to the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nowag_ext.decoder import decoder_layers, decoder_linears, matches
from nowag_ext.forecast import Sizes
from nowag_ext.methods import LayerSettings, Settings, VQSettings
from nowag_ext.pipeline import blocks, codebooks, distill, streams
from nowag_ext.pipeline import compress as pipeline
from nowag_ext.plan_head import plan_head
from nowag_ext.report import peak_memory
from nowag_ext.sampling import AT_ONCE, windows_to_write
from nowag_ext.speeds import Speeds, measure_search, measure_speeds

_FLOAT = 4

# Copies of a weight, and of the Hessian, that compressing one linear takes beside them.
_WEIGHT_COPIES = {"vq": 4, "prune": 6}
_METRIC_COPIES = {"vq": 1, "prune": 2}

# The tokenizer and what holds the layers on disk; and what the C library's allocator keeps of what
# was freed, at most: on SmolLM2 both were found as what was missing.
_LOADED = 84 << 20
_MOST_KEPT = 256 << 20

# Of the logits of some tokens, where two models' are compared.
_LOGITS_COPIES = 6

# Seconds that a layer takes to be called for a few tokens, beside what it computes.
_EAGER_LAYER = 5e-4

# Runs of a window's first tokens that finding out a layer's groups takes, beside one of all.
_TRACES = 4


@dataclass(frozen=True)
class Work:
    """How much calibration text a run takes: ``samples`` windows of ``length`` tokens.

    ``offload``: its hidden states are on disk. 0 samples: none, norms are given. ``head``: the
    settings of the head, if that is packed too. ``distilled``: windows, of ``distilled_length``,
    that the result is tuned on. ``writes``: the model has to write one of the ``texts``.
    """

    recipe: str
    samples: int
    length: int
    offload: bool
    head: VQSettings | None = None
    distilled: int = 0
    distilled_length: int = 1
    texts: int = 1
    writes: bool = False

    @property
    def written(self) -> int:
        """Windows that the model writes."""
        if not self.writes:
            return 0
        later = self.distilled * self.distilled_length
        return windows_to_write(self.samples, self.length, later, self.texts)


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        sizes: what it writes.
        memory: bytes by what they are for; their sum is the largest resident size.
        stages: seconds by stage, as in a report.
    """

    work: Work
    sizes: Sizes
    memory: dict[str, int]
    stages: dict[str, float]

    @property
    def peak_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())


@dataclass(frozen=True)
class _Group:
    """Linears that read the same input; ``sums`` is whether they add to the residual stream."""

    inputs: int
    outputs: tuple[int, ...]
    sums: bool

    @property
    def weights(self) -> int:
        return self.inputs * sum(self.outputs)

    @property
    def widest(self) -> int:
        """Weights of the largest of them."""
        return self.inputs * max(self.outputs)


@dataclass(frozen=True)
class _Layer:
    groups: tuple[_Group, ...]  # of the linears to be compressed
    weights: int  # of all its linears
    parameters: int


def forecast(
    model: Any,
    settings: LayerSettings,
    ignore: Sequence[str],
    codebook_scope: str,
    sizes: Sizes,
    work: Work,
) -> Forecast:
    """What compressing a model will take, given its outline (``forecast.skeleton``)."""
    costs = _costs(model, settings, ignore, codebook_scope, work)
    return Forecast(work, sizes, costs.memory(work, sizes), costs.seconds(work))


def affordable_samples(
    model: Any,
    settings: LayerSettings,
    ignore: Sequence[str],
    codebook_scope: str,
    work: Work,
    seconds: float,
) -> int:
    """How many windows, of the length and recipe of ``work``, so much time is enough for; or 0."""
    costs = _costs(model, settings, ignore, codebook_scope, work)
    # Seconds grow by as much with every window, once there are enough for what takes but a few.
    few = max(codebooks._WINDOWS, pipeline._NORM_WINDOWS)
    least, more = (
        sum(costs.seconds(replace(work, samples=samples)).values()) for samples in (few, 2 * few)
    )
    return max(0, few + math.floor((seconds - least) * few / (more - least)))


def _costs(
    model: Any, settings: LayerSettings, ignore: Sequence[str], codebook_scope: str, work: Work
) -> _Costs:
    base = peak_memory()
    hidden = model.get_input_embeddings().weight.shape[1]
    layers = [_layer(name, layer, ignore, hidden) for name, layer in decoder_layers(model).items()]
    linears = decoder_linears(model).items()
    compressed = {name: linear for name, linear in linears if not matches(name, ignore)}
    by_settings: dict[Settings, int] = {}
    trained = 0
    for name, linear in compressed.items():
        one = settings.of(name)
        by_settings[one] = by_settings.get(one, 0) + linear.weight.numel()
        if isinstance(one, VQSettings) and codebook_scope != "layer":
            trained += linear.weight.numel()
    # Times are those of the settings of most weights.
    typical = max(by_settings, key=lambda one: by_settings[one], default=settings.default)
    speeds = measure_speeds(model, typical, work.length, hidden)
    head = None if work.head is None else _head(model, work.head, speeds)
    return _Costs(model, layers, typical, hidden, trained, base, speeds, head)


@dataclass(frozen=True)
class _Head:
    """What packing the head takes: bytes, and seconds."""

    memory: int
    seconds: float


def _head(model: Any, settings: VQSettings, speeds: Speeds) -> _Head:
    unit = plan_head(model, settings).unit
    inputs, size = unit.shape[1], unit.size
    search = measure_search(settings, inputs, speeds.products)
    iters = min(settings.iters, codebooks.TRAINING_ITERATIONS)
    return _Head(
        _FLOAT * (2 * size + inputs**2 + _beside(settings.method, size, inputs)),
        min(size, codebooks.TRAINING_WEIGHTS) * search.clustering(iters)
        + size * (search.compression + 3 * inputs / speeds.products),
    )


@dataclass(frozen=True)
class _Costs:
    """What a run's costs follow from, but for the number of windows."""

    model: Any
    layers: Sequence[_Layer]
    typical: Settings
    hidden: int
    trained: int  # weights that share a codebook
    base: int  # bytes in memory before it begins
    speeds: Speeds
    head: _Head | None

    def memory(self, work: Work, sizes: Sizes) -> dict[str, int]:
        rest = _memory(
            self.model, self.layers, self.typical.method, sizes, work, self.hidden, self.trained,
            self.head,
        )  # fmt: skip
        return {"the program": self.base + _LOADED, **rest}

    def seconds(self, work: Work) -> dict[str, float]:
        stages = _seconds(self.layers, self.typical, work, self.trained, self.speeds)
        if work.writes:
            stages = {"writing text": self._writing(work), **stages}
        if self.head is not None:
            stages["head"] = self.head.seconds
        if work.distilled:
            stages["distillation"] = self._distillation(work)
        return stages

    def _writing(self, work: Work) -> float:
        """Of each token of some windows that are written together: all products, and attention."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        weights = sum(layer.weights for layer in self.layers) + vocabulary * self.hidden
        products = 2 * AT_ONCE * weights / self.speeds.few_products
        attention = _cached(self.model, work.length) / self.speeds.copies
        token = products + attention + len(self.layers) * _EAGER_LAYER
        return work.written / AT_ONCE * work.length * token

    def _distillation(self, work: Work) -> float:
        """Of each window: the dense model, the compressed one, and the way back through that."""
        speeds, length = self.speeds, work.distilled_length
        part = length / work.length
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        logits = length * vocabulary
        heads = 3 * 2 * logits * self.hidden / speeds.products + logits * speeds.divergence
        weights = sum(layer.weights for layer in self.layers)
        products = 2 * weights * length / speeds.products
        beside = len(self.layers) * (part**2 * speeds.attention + part * speeds.elementwise)
        recorded = sum(
            _recorded(layer, work.distilled_length, self.hidden) for layer in self.layers
        )
        again = max(0.0, 1 - distill._RECORD_BYTES / recorded)
        tuned = sum(group.weights for layer in self.layers for group in layer.groups)
        runs = 4 + again  # two there, and back along the inputs and along the weights
        return work.distilled * (runs * (products + beside) + tuned * speeds.search.tuning + heads)


def _layer(name: str, layer: nn.Module, ignore: Sequence[str], hidden: int) -> _Layer:
    linears = {n: part for n, part in layer.named_modules() if isinstance(part, nn.Linear)}
    last = {part.rpartition(".")[0]: part for part in linears}
    members: dict[tuple[str, int, bool], list[int]] = {}
    for part, linear in linears.items():
        if matches(f"{name}.{part}" if part else name, ignore):
            continue
        parent = part.rpartition(".")[0]
        sums = last[parent] == part and linear.out_features == hidden
        members.setdefault((parent, linear.in_features, sums), []).append(linear.out_features)
    groups = tuple(_Group(key[1], tuple(outputs), key[2]) for key, outputs in members.items())
    weights = sum(linear.weight.numel() for linear in linears.values())
    return _Layer(groups, weights, sum(parameter.numel() for parameter in layer.parameters()))


def _memory(
    model: Any,
    layers: Sequence[_Layer],
    method: str,
    sizes: Sizes,
    work: Work,
    hidden: int,
    trained: int,
    head: _Head | None,
) -> dict[str, int]:
    """Bytes by what they are for, where most is alive."""
    of_layers = {
        id(parameter)
        for layer in decoder_layers(model).values()
        for parameter in layer.parameters()
    }
    every = {id(parameter): parameter for parameter in model.parameters()}
    inside = sum(parameter.nbytes for key, parameter in every.items() if key in of_layers)
    outside = sum(parameter.nbytes for parameter in every.values()) - inside
    always = {"weights outside the layers": outside}
    if work.recipe != "feedback":
        if work.samples:
            always["the layers, dense"] = inside
        widest = max((group.widest for one in layers for group in one.groups), default=0)
        return {
            **always, "what is compressed": sizes.compressed,
            "compressing a linear": _WEIGHT_COPIES[method] * _FLOAT * widest,
        }  # fmt: skip
    window = work.length * hidden * _FLOAT
    most = max(layers, key=lambda one: one.parameters)
    block = most.parameters * _FLOAT
    # A layer is there twice, as it was and compressed so far, and the statistics of a group.
    seen = _seen(most, work, hidden)
    last = max((_group_bytes(group, method) for group in most.groups), default=0)
    through = {
        "hidden states": 0 if work.offload else 2 * work.samples * window,
        "what windows show of a layer": seen,
        "layers in fp32, and statistics": 2 * block + last,
    }
    # Before that, codebooks are trained on what is sampled of the weights: points, codes, gaps ...
    sampled = min(trained, codebooks.TRAINING_WEIGHTS)
    training = {"training codebooks": int(sampled * _FLOAT * 1.6)} if trained else {}
    # ... and re-estimated under the Hessians of a layer's groups.
    windows = min(codebooks._WINDOWS, work.samples)
    hessians = _FLOAT * sum(group.inputs**2 for group in most.groups)
    one = max((_beside(method, g.widest, g.inputs) for g in most.groups), default=0)
    estimating = {
        "hidden states": windows * window,
        "layers in fp32, and statistics": hessians + max(block, _FLOAT * one),
    }
    # What is compressed stays in its files until it is tuned, or written.
    written = {"what is compressed": sizes.compressed}
    stages: list[dict[str, int]] = [through, training, estimating if trained else {}, written]
    if head is not None:
        states = through["hidden states"]
        stages.append({"hidden states": states, "the head, in fp32": head.memory})
    if work.writes:
        stages.append({
            "the layers, dense": inside, "keys and values": _cached(model, work.length)
        })  # fmt: skip
    if work.distilled:
        length = work.distilled_length
        recorded = sum(_recorded(layer, length, hidden) for layer in layers)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        untied = output is not None and output.weight is not embedding.weight
        copied = sum(
            _FLOAT * parameter.numel()
            for key, parameter in every.items()
            if key not in of_layers
            and parameter.dtype != torch.float32
            and not (untied and parameter is embedding.weight)
        )
        stages.append({
            **written,
            "hidden states": 0 if work.offload else work.distilled * length * hidden * _FLOAT,
            "the head in fp32": copied,
            "what is recorded of the layers": min(recorded, distill._RECORD_BYTES) + 2 * block,
            "logits": _LOGITS_COPIES * min(length, distill._HEAD_TOKENS) * vocabulary * _FLOAT,
        })  # fmt: skip
    largest = max(stages, key=lambda stage: sum(stage.values()))
    freed = sum(sum(stage.values()) for stage in stages)
    return {**always, **largest, "what the allocator keeps": min(_MOST_KEPT, freed // 2)}


def _cached(model: Any, length: int) -> int:
    """Bytes of the keys and values of windows that are written together."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = 2 * (getattr(config, "num_key_value_heads", None) or heads) * size
    return AT_ONCE * length * config.num_hidden_layers * kept * model.dtype.itemsize


def _seen(layer: _Layer, work: Work, hidden: int) -> int:
    """What both streams may keep of a layer (streams.py): what modules added to the residual, and
    of the compressed one what the linears read that they end with."""
    ending = [group.inputs for group in layer.groups if group.sums]
    dense = len(ending) * hidden * work.length * _FLOAT
    compressed = dense + max(ending, default=0) * work.length * _FLOAT
    room = (streams._SEEN_BYTES // max(1, one) for one in (dense, compressed))
    kept = (min(work.samples, windows) for windows in room)
    return sum(windows * one for windows, one in zip(kept, (dense, compressed), strict=True))


def _recorded(layer: _Layer, length: int, hidden: int) -> int:
    """What a layer's record for the way back holds: weights, and what is between them.

    What is added to the residual stream is not kept; norms and attention take about five times
    the hidden states. SmolLM2's layers hold 0.6 % less.
    """
    kept = (group.inputs + (not group.sums) * sum(group.outputs) for group in layer.groups)
    between = sum(kept) + 5 * hidden
    return _FLOAT * (layer.weights + length * between)


def _group_bytes(group: _Group, method: str) -> int:
    """The statistics of a group while its corrections are solved for, or its linears compressed."""
    square, every = group.inputs**2, group.weights
    solving = square * (2 + (not group.sums)) + every * (1 + group.sums) + 2 * group.widest
    return _FLOAT * max(solving, square + every + _beside(method, group.widest, group.inputs))


def _beside(method: str, weights: int, inputs: int) -> int:
    """Numbers that compressing a linear takes beside its weight and Hessian."""
    return _WEIGHT_COPIES[method] * weights + _METRIC_COPIES[method] * inputs**2


def _seconds(
    layers: Sequence[_Layer],
    settings: Settings,
    work: Work,
    trained: int,
    speeds: Speeds,
) -> dict[str, float]:
    length = work.length
    iters = settings.iters if isinstance(settings, VQSettings) else 1

    def products(operations: float) -> float:
        return operations / speeds.products

    def run(layer: _Layer) -> float:
        """One window through one layer."""
        return products(2 * layer.weights * length) + speeds.attention + speeds.elementwise

    once = sum(run(layer) for layer in layers)
    weights = sum(group.weights for layer in layers for group in layer.groups)
    if work.recipe != "feedback":
        stages = {"activation norms": work.samples * once} if work.samples else {}
        return {
            **stages,
            "compression": weights * speeds.search.clustering(iters),
        }
    stages = {"activation norms": min(pipeline._NORM_WINDOWS, work.samples) * once}
    if trained:
        sample = min(trained, codebooks.TRAINING_WEIGHTS)
        most = min(iters, codebooks.TRAINING_ITERATIONS)
        stages["codebooks"] = sample * speeds.search.clustering(most)
    forwards = traces = statistics = compression = factors = updates = hessians = 0.0
    for layer in layers:
        forwards += 2 * work.samples * run(layer)  # once in each stream
        traces += (1 + _TRACES * min(1.0, blocks._TRACE_TOKENS / length)) * run(layer)
        for group in layer.groups:
            square = group.inputs**2
            hessians += products(square * length)
            beside = group.weights if group.sums else square
            statistics += work.samples * products((square + 2 * beside) * length)
            statistics += products(group.inputs**3 / 3 + 2 * group.inputs * group.weights)
            factors += len(group.outputs) * products(group.inputs**3 / 3)
            updates += products(3 * group.inputs * group.weights)
            compression += group.weights * speeds.search.compression
    if trained:
        windows = min(codebooks._WINDOWS, work.samples)
        share = min(1.0, codebooks._ESTIMATION_WEIGHTS / trained)
        of_rows = share * (updates + compression)
        stages["re-estimation"] = windows * (once + hessians) + traces + factors + of_rows
    else:
        forwards += traces
    if not trained and isinstance(settings, VQSettings):
        compression += weights * speeds.search.clustering(iters)
    return {
        **stages, "forwards": forwards, "statistics": statistics,
        "compression": factors + updates + compression,
    }  # fmt: skip
