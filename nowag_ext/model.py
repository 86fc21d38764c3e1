"""A whole model: every linear of its decoder layers checked, compressed and replaced."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nowag_ext.codebook import adopt_codebooks
from nowag_ext.decoder import check_patterns, decoder_linears, decoder_weights, matches
from nowag_ext.grad_mode import ordinary_tensors
from nowag_ext.integrations.transformers import NowagConfig, attach, format_group
from nowag_ext.linear import PackedWeight
from nowag_ext.methods import LayerSettings, Settings, packed_linear
from nowag_ext.normalize import as_importance, as_weight
from nowag_ext.report import LayerReport, ModelReport, Progress
from nowag_ext.resume import LayerStore, layer_key
from nowag_ext.version import __version__

_SHOWN = 3  # names in a sentence about many


@dataclass(frozen=True)
class _Unit:
    """One linear to compress, checked."""

    linear: nn.Linear
    act_norms: Tensor
    settings: Settings


@dataclass(frozen=True)
class _Plan:
    """What is to be compressed, and how, once everything has been checked."""

    settings: Settings  # of what no override names
    units: dict[str, _Unit]
    ignored: tuple[str, ...]
    not_reached: tuple[str, ...]
    decoder_weights: int


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
    plan = _plan(model, act_norms, (method, settings), ignore, overrides or {}, min_coverage)
    store = None if work_dir is None else LayerStore(work_dir)
    weights, layers = _compress(plan, store, progress)
    report = ModelReport(
        method=method,
        settings=asdict(plan.settings),
        layers=tuple(layers),
        decoder_weights=plan.decoder_weights,
        ignored=plan.ignored,
        not_reached=plan.not_reached,
        seconds=time.perf_counter() - start,
        versions={
            "nowag_ext": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    )
    config = _config(plan, weights)
    _replace(model, plan, weights)
    codebooks = adopt_codebooks(model)
    if codebooks is not None:
        shared = sum(parameter.nbytes for parameter in codebooks.parameters())
        report = replace(report, codebook_bytes=shared)
    attach(model, config)
    model.nowag_report = report
    return model


def _plan(
    model: Any,
    act_norms: Mapping[str, Tensor],
    method: tuple[str, Mapping[str, Any]],
    ignore: Sequence[str],
    overrides: Mapping[str, Mapping[str, Any]],
    min_coverage: float,
) -> _Plan:
    settings = LayerSettings(*method, overrides)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError("the model is already quantised: compress the dense model it came from.")
    if getattr(model, "peft_config", None):
        raise ValueError("the model has a PEFT adapter: merge it first (merge_and_unload).")
    if isinstance(ignore, str):
        raise TypeError(f'ignore must be a list of patterns, not the string "{ignore}".')
    check_patterns(model, ignore, "ignore")
    check_patterns(model, list(overrides), "overrides")
    every = decoder_linears(model)
    ignored = tuple(name for name in every if matches(name, ignore))
    linears = {name: linear for name, linear in every.items() if name not in ignored}
    _check_parameters(linears)
    not_reached = _check_coverage(model, every, linears, min_coverage)
    _check_shared(model, linears)
    units = {
        name: _check_layer(name, linear, act_norms, settings.of(name))
        for name, linear in linears.items()
    }
    total = sum(weight.numel() for _, weight in decoder_weights(model))
    return _Plan(settings.default, units, ignored, not_reached, total)


def _check_parameters(linears: Mapping[str, nn.Linear]) -> None:
    """Raises for a linear whose weight another module or a hook computes."""
    for name, linear in linears.items():
        if "weight" not in linear._parameters:
            raise ValueError(
                f"{name} computes its weight from other parameters (torch.nn.utils."
                "parametrizations, torch.nn.utils.prune): make it a parameter first with "
                "remove_parametrizations or prune.remove, or ignore the layer."
            )


def _check_coverage(
    model: Any,
    every: Mapping[str, nn.Linear],
    linears: Mapping[str, nn.Linear],
    min_coverage: float,
) -> tuple[str, ...]:
    """The decoder layers' parameters that are no linear's; raises if they are too many."""
    sizes = {name: weight.numel() for name, weight in decoder_weights(model)}
    own = {f"{name}.weight" for name in every}
    not_reached = {name: size for name, size in sizes.items() if name not in own}
    if not linears:
        raise ValueError(
            "the model has no nn.Linear in its decoder layers that is not ignored: "
            f"nothing to compress{_largest(not_reached)}."
        )
    reached = 1 - sum(not_reached.values()) / sum(sizes.values())
    if reached < min_coverage:
        raise ValueError(
            f"only {reached:.0%} of the decoder layers' weights are nn.Linear's, less than the "
            f"{min_coverage:.0%} asked for{_largest(not_reached)}. Set min_coverage to "
            f"{int(reached * 100) / 100} to compress those alone."
        )
    return tuple(not_reached)


def _largest(sizes: Mapping[str, int]) -> str:
    names = sorted(sizes, key=lambda name: -sizes[name])[:_SHOWN]
    return f" (not reached: {', '.join(names)}, ...)" if names else ""


def _check_shared(model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    """Raises if replacing a linear would part it from another module that uses its weight."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    for name, linear in linears.items():
        names = owners[id(linear.weight)]
        if len(names) > 1:
            raise ValueError(
                f"{name} shares its weight with {', '.join(sorted(names - {f'{name}.weight'}))}: "
                "ignore the layer."
            )


def _check_layer(
    name: str, linear: nn.Linear, act_norms: Mapping[str, Tensor], settings: Settings
) -> _Unit:
    """The layer with its act_norms on its weight's device; raises if anything is unfit."""
    weight = linear.weight
    if weight.is_meta:
        raise ValueError(f"{name} is offloaded: its weight must be in memory to be compressed.")
    norms = act_norms.get(name)
    if norms is None:
        raise ValueError(
            f"act_norms has no entry for {name}: calibrate this model, or ignore the layer."
        )
    norms = norms.to(weight.device) if isinstance(norms, Tensor) else norms
    try:
        as_weight(weight)
        as_importance(norms, linear.in_features, weight.device)
        if not all(torch.isfinite(extreme) for extreme in weight.aminmax()):  # NaN propagates
            raise ValueError("W must be finite, but it holds a NaN or an infinity.")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    try:
        settings.check_layer(linear.out_features, linear.in_features)
    except ValueError as error:
        raise ValueError(f"{name} {error}.") from None
    return _Unit(linear, norms, settings)


def _compress(
    plan: _Plan, store: LayerStore | None, progress: Progress | None
) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
    weights: dict[str, PackedWeight] = {}
    reports: list[LayerReport] = []
    total = float(sum(unit.linear.weight.numel() for unit in plan.units.values()))
    done = 0.0
    for name, unit in plan.units.items():
        size = unit.linear.weight.numel()

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
    name: str, unit: _Unit, store: LayerStore | None, tell: Callable[[float], None]
) -> tuple[PackedWeight, LayerReport]:
    start = time.perf_counter()
    dense = unit.linear.weight.detach()
    key = "" if store is None else layer_key(unit.settings, dense, unit.act_norms)
    stored = None if store is None else store.get(name, key, unit.settings, dense)
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
    return weight, LayerReport(
        name=name,
        method=unit.settings.method,
        settings=asdict(unit.settings),
        out_features=dense.shape[0],
        in_features=dense.shape[1],
        relative_objective=float(weight.relative_objective or 0.0),
        bits_per_weight=weight.bits_per_weight,
        bytes=weight.nbytes,
        seconds=seconds,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        resumed=stored is not None,
        dead_inputs=int((unit.act_norms == 0).sum()),
    )


def _config(plan: _Plan, weights: Mapping[str, PackedWeight]) -> NowagConfig:
    """A group for each way of compressing and dtype of weight: readers build modules from it."""
    groups: list[dict[str, Any]] = []
    for name, unit in plan.units.items():
        form = {**unit.settings.form(), **weights[name].shared}
        group = format_group(
            unit.settings.method, form, unit.linear.weight.dtype, asdict(unit.settings), []
        )
        same = [known for known in groups if {**known, "modules": []} == group]
        if not same:
            groups.append(group)
        (same[0] if same else group)["modules"].append(name)
    return NowagConfig(groups=groups)


def _replace(model: nn.Module, plan: _Plan, weights: Mapping[str, PackedWeight]) -> None:
    """Builds every module, then puts them in place: nothing that can fail comes in between."""
    modules = {}
    for name, unit in plan.units.items():
        module = packed_linear(unit.settings.method, weights[name], unit.linear.bias)
        modules[name] = module.train(unit.linear.training)
    for name, module in modules.items():
        model.set_submodule(name, module)
