"""A whole model: every linear of its decoder layers checked, compressed and replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nowag_ext.codebook import adopt_codebooks
from nowag_ext.embedding import VQEmbedding, tie_head
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.groups import format_group
from nowag_ext.integrations.transformers import NowagConfig, attach
from nowag_ext.linear import PackedWeight
from nowag_ext.methods import packed_linear
from nowag_ext.offload import bias_of, take_hooks
from nowag_ext.plan import Plan, Unit, plan_compression
from nowag_ext.plan_head import HeadPlan
from nowag_ext.report import LayerReport, ModelReport, Progress, peak_memory
from nowag_ext.resume import LayerStore, layer_key, open_store
from nowag_ext.version import __version__
from nowag_ext.vq import VQWeight


@dataclass(frozen=True)
class PackedHead:
    """A compressed head, to be put in its place."""

    plan: HeadPlan
    weight: VQWeight
    report: LayerReport

    def group(self) -> dict[str, Any]:
        """Its entry of a configuration's ``groups``."""
        plan, unit = self.plan, self.plan.unit
        form = unit.settings.form()
        if plan.embedding is not None:
            form["embedding"] = plan.embedding
        return format_group("vq", form, unit.dtype, asdict(unit.settings), [plan.name])

    def replace(self, model: Any) -> None:
        """Puts it into the model, in the embedding's place too where that is tied to it."""
        plan, unit = self.plan, self.plan.unit
        module = packed_linear("vq", self.weight, bias_of(unit.linear)).train(unit.linear.training)
        model.set_submodule(plan.name, take_hooks(module, unit.linear))
        if plan.embedding is None:
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False  # what a class would tie, and here is not
        else:
            dense = model.get_submodule(plan.embedding)
            embedding = VQEmbedding.from_weight(dense, self.weight, unit.dtype)
            model.set_submodule(plan.embedding, take_hooks(embedding.train(dense.training), dense))
            tie_head(model, plan.embedding, plan.name)


@ordinary_tensors
def compress_model(
    model: Any,
    act_norms: Mapping[str, Tensor],
    method: str = "vq",
    ignore: Sequence[str] = ("lm_head",),
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    min_coverage: float = 0.8,
    work_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Any:
    """Replaces every ``nn.Linear`` of a causal LM's decoder layers by its compressed form.

    Everything is checked before work starts. The modules are replaced at the very end: after any
    exception, an interrupt included, the model is as it was.

    Args:
        model: a Hugging Face causal LM, dense, its weights fp32, fp16 or bf16. Changed in place.
        act_norms: by module name, [in_features]: what ``calibrate`` returns.
        method: "vq" (settings d, bits, iters, n_init, init, seed: ``vq_compress``) or "prune"
            (settings sparsity or pattern: ``prune``).
        ignore: linears to leave dense: full names, last parts of names, or "re:" and a regular
            expression. What is outside the decoder layers, the lm_head say, stays dense anyway.
        overrides: other settings for some linears, by such a pattern: {"down_proj": {"bits": 3}}
            changes those, {"o_proj": {"method": "prune", "pattern": "2:4"}} the method. Of several
            patterns that name a linear the last counts.
        min_coverage: refuse if less than this share of the decoder layers' weights is an
            ``nn.Linear``'s (3-D expert parameters and the like are not reached).
        work_dir: a directory for finished layers. A run that was interrupted goes on from there;
            remove it when the model is saved. None: nothing is kept.
        progress: called with (layer name, weights done, weights in all).

    Returns:
        The same model, with a ``nowag_report`` (ModelReport), ready for ``save_pretrained``.

    Raises:
        ValueError: unfit settings, layers, weights or act_norms; the sentence names the layer.
        TypeError: a setting that the method does not have, or weights of another dtype.
    """
    start = time.perf_counter()
    plan = plan_compression(
        model, act_norms, (method, settings), ignore, overrides or {}, min_coverage
    )
    with open_store(work_dir) as store:
        weights, layers = _compress(plan, store, progress)
    install(model, plan, weights, layers, time.perf_counter() - start)
    return model


def install(
    model: Any,
    plan: Plan,
    weights: Mapping[str, PackedWeight],
    layers: Sequence[LayerReport],
    seconds: float,
    stages: Mapping[str, float] | None = None,
    calibration_tokens: int = 0,
    head: PackedHead | None = None,
) -> None:
    """Puts the compressed weights of a plan into the model, and says so in config and report."""
    report = ModelReport(
        method=plan.settings.method,
        settings=asdict(plan.settings),
        layers=tuple(layers),
        decoder_weights=plan.decoder_weights,
        ignored=plan.ignored,
        not_reached=plan.not_reached,
        seconds=seconds,
        stages=dict(stages or {}),
        calibration_tokens=calibration_tokens,
        head=None if head is None else head.report,
        versions={
            "nowag_ext": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    )
    config = _config(plan, weights, head)
    _replace(model, plan, weights)
    if head is not None:
        head.replace(model)
    codebooks = adopt_codebooks(model)
    if codebooks is not None:
        shared = sum(parameter.nbytes for parameter in codebooks.parameters())
        report = replace(report, codebook_bytes=shared)
    attach(model, config)
    model.nowag_report = report


def _compress(
    plan: Plan, store: LayerStore | None, progress: Progress | None
) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
    weights: dict[str, PackedWeight] = {}
    reports: list[LayerReport] = []
    total = float(sum(unit.size for unit in plan.units.values()))
    done = 0.0
    for name, unit in plan.units.items():
        size = unit.size

        def tell(share: float, name: str = name, size: int = size, done: float = done) -> None:
            if progress is not None:
                progress(name, done + share * size, total)

        tell(0.0)
        weight, report = _compress_unit(name, unit, store, tell)
        weights[name] = weight
        reports.append(report)
        tell(1.0)
        done += size
    return weights, reports


def _compress_unit(
    name: str, unit: Unit, store: LayerStore | None, tell: Callable[[float], None]
) -> tuple[PackedWeight, LayerReport]:
    start = time.perf_counter()
    dense = unit.weight
    key = "" if store is None else layer_key(unit.settings, dense, unit.act_norms)
    stored = None if store is None else store.get(name, key, unit)
    if stored is not None:
        weight, seconds = stored
    else:
        try:
            weight = unit.settings.compress(dense, unit.act_norms, tell)
        except Exception as error:
            raise RuntimeError(
                f"{name} could not be compressed, and the model is unchanged: {error}"
            ) from error
        seconds = time.perf_counter() - start
        if store is not None:
            store.put(name, key, weight, seconds)
    return weight, layer_report(name, unit, weight, seconds, resumed=stored is not None)


def layer_report(
    name: str, unit: Unit, weight: PackedWeight, seconds: float, *, resumed: bool = False
) -> LayerReport:
    """What became of one linear of a plan."""
    return LayerReport(
        name=name,
        method=unit.settings.method,
        settings=asdict(unit.settings),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        relative_objective=float(weight.relative_objective or 0.0),
        bits_per_weight=weight.bits_per_weight,
        bytes=weight.nbytes,
        seconds=seconds,
        peak_memory=peak_memory(),
        resumed=resumed,
        dead_inputs=int((unit.act_norms == 0).sum()),
        damping=weight.damping,
        effective_rank=weight.effective_rank,
    )


def _config(
    plan: Plan, weights: Mapping[str, PackedWeight], head: PackedHead | None
) -> NowagConfig:
    """A group for each way of compressing and dtype of weight: readers build modules from it."""
    groups: list[dict[str, Any]] = []
    for name, unit in plan.units.items():
        form = {**unit.settings.form(), **weights[name].shared}
        group = format_group(unit.settings.method, form, unit.dtype, asdict(unit.settings), [])
        same = [known for known in groups if {**known, "modules": []} == group]
        if not same:
            groups.append(group)
        (same[0] if same else group)["modules"].append(name)
    if head is not None:
        groups.append(head.group())
    return NowagConfig(groups=groups)


def _replace(model: nn.Module, plan: Plan, weights: Mapping[str, PackedWeight]) -> None:
    """Builds every module, then puts them in place: nothing that can fail comes in between."""
    modules: dict[str, nn.Module] = {}
    for name, unit in plan.units.items():
        packed = packed_linear(unit.settings.method, weights[name], bias_of(unit.linear))
        modules[name] = take_hooks(packed.train(unit.linear.training), unit.linear)
    for name, module in modules.items():
        model.set_submodule(name, module)
