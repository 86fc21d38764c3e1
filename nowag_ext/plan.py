"""What of a model is to be compressed, and how: all that is checked before work starts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nowag_ext.decoder import check_patterns, decoder_linears, decoder_weights, matches
from nowag_ext.methods import LayerSettings, Settings
from nowag_ext.normalize import as_importance, as_weight
from nowag_ext.offload import bias_of, device_of, own_parameters, weight_of
from nowag_ext.weight_reads import weight_readers, weight_readers_text

_SHOWN = 3  # names in a sentence about many
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Unit:
    """One linear to compress, checked; its weight may be on disk until it is asked for."""

    linear: nn.Linear
    act_norms: Tensor
    settings: Settings

    @property
    def weight(self) -> Tensor:
        return weight_of(self.linear)

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.weight.dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.linear)

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.out_features, self.linear.in_features

    @property
    def size(self) -> int:
        return self.linear.weight.numel()


@dataclass(frozen=True)
class Plan:
    """What is to be compressed, and how, once everything has been checked."""

    settings: Settings  # of what no override names
    units: dict[str, Unit]
    ignored: tuple[str, ...]
    not_reached: tuple[str, ...]
    decoder_weights: int


def plan_compression(
    model: Any,
    act_norms: Mapping[str, Tensor],
    method: tuple[str, Mapping[str, Any]],
    ignore: Sequence[str],
    overrides: Mapping[str, Mapping[str, Any]],
    min_coverage: float,
    *,
    shared_codebooks: bool = False,
) -> Plan:
    """The checked plan; arguments and errors are those of ``compress_model``.

    Where codebooks are shared a layer may be smaller than one.
    """
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
    _check_overrides(overrides, every, linears)
    _check_parameters(linears)
    _check_forwards(linears)
    not_reached = _check_coverage(model, every, linears, min_coverage)
    _check_shared(model, linears)
    check_weight_reads(model, linears)
    units = {
        name: _check_layer(name, linear, act_norms, settings.of(name), shared_codebooks)
        for name, linear in linears.items()
    }
    _check_rest(model, {f"{name}.weight" for name in linears})
    total = sum(weight.numel() for _, weight in decoder_weights(model))
    return Plan(settings.default, units, ignored, not_reached, total)


def _check_overrides(
    patterns: Iterable[str], every: Collection[str], linears: Collection[str]
) -> None:
    """Raises for a pattern that names nothing that is to be compressed."""
    for pattern in patterns:
        if any(matches(name, [pattern]) for name in linears):
            continue
        if any(matches(name, [pattern]) for name in every):
            raise ValueError(f"overrides pattern {pattern!r} names only what ignore leaves dense.")
        raise ValueError(
            f"overrides pattern {pattern!r} names no linear of the decoder layers, which alone it "
            "is for: an lm_head has settings of its own (head)."
        )


def _check_forwards(linears: Mapping[str, nn.Linear]) -> None:
    """Raises for a subclass of nn.Linear that does other than to multiply and add its bias."""
    for name, linear in linears.items():
        if type(linear).forward is not nn.Linear.forward and not _multiplies(linear):
            raise ValueError(
                f"{name} is a {type(linear).__name__}, which does more than an nn.Linear: leave "
                f"it dense with ignore=['{name.rpartition('.')[2]}']."
            )


def _multiplies(linear: nn.Linear) -> bool:
    weight = weight_of(linear)
    if weight.is_meta:
        return True  # which says nothing, and is refused for that
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(
        2, linear.in_features, generator=generator, dtype=torch.float32, device="cpu"
    ).to(weight.device, weight.dtype)
    modes = [(part, part.training) for part in linear.modules()]
    with torch.no_grad():
        expected = nn.functional.linear(x, weight, bias_of(linear))
        try:
            output = linear.eval()(x)
        except Exception:  # whatever it wants, it is no nn.Linear
            return False
        finally:
            for part, training in modes:
                part.training = training
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    # What rounding and other ways of multiplying leave; a NaN in the weight is for others to find.
    off = 0.05 * float(expected.float().abs().nanmean())
    return torch.allclose(output, expected, rtol=0.05, atol=off, equal_nan=True)


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
    # Of weights on disk transformers alone knows, by one name of each, once they have been read.
    tied: dict[str, set[str]] = {}
    for alias, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        tied.setdefault(source, {source}).add(alias)
    by_name = {name: names for names in tied.values() for name in names}
    for name, linear in linears.items():
        names = owners[id(linear.weight)]
        if linear.weight.is_meta:
            names = names | by_name.get(f"{name}.weight", set())
        if len(names) > 1:
            raise ValueError(
                f"{name} shares its weight with {', '.join(sorted(names - {f'{name}.weight'}))}: "
                "ignore the layer."
            )


def check_weight_reads(model: Any, linears: Mapping[str, nn.Linear]) -> None:
    """Raises for linears whose weight the model's own code reads."""
    readers = weight_readers(model, linears)
    if readers:
        parts = sorted({name.rpartition(".")[2] for name in readers})
        raise ValueError(
            f"{weight_readers_text(readers)}: leave it dense with ignore={parts} "
            f"({' '.join(f'--ignore {part}' for part in parts)})."
        )


def _check_rest(model: nn.Module, weights: set[str]) -> None:
    """Raises for a parameter other than these that is not finite, wherever it lies."""
    rest = {name for name, _ in model.named_parameters()} - weights
    for prefix, module in model.named_modules():
        names = {f"{prefix}.{own}".lstrip("."): own for own in module._parameters}
        if rest.isdisjoint(names):
            continue
        with own_parameters(module) as own:
            found = {full: own[name] for full, name in names.items() if full in rest}
            check_finite(found, "must be finite, but it")


def check_finite(parameters: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError for a parameter with a NaN or an infinity: its name, ``what``, and that.

    Costs one look at every parameter, which takes 4 GB/s on two cores.
    """
    for name, parameter in parameters.items():
        if parameter.is_meta or parameter.dtype not in _FLOATS or not parameter.numel():
            continue
        if not all(torch.isfinite(extreme) for extreme in parameter.detach().aminmax()):
            raise ValueError(f"{name} {what} holds a NaN or an infinity.")


def _check_layer(
    name: str,
    linear: nn.Linear,
    act_norms: Mapping[str, Tensor],
    settings: Settings,
    shared_codebooks: bool,
) -> Unit:
    """The layer with its act_norms on its weight's device; raises if anything is unfit."""
    weight = weight_of(linear)
    if weight.is_meta:
        raise ValueError(f"{name} has no weight: the model is on the meta device, without data.")
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
        settings.check_layer(linear.out_features, linear.in_features, shared_codebooks)
    except ValueError as error:
        raise ValueError(f"{name} {error}.") from None
    return Unit(linear, norms, settings)
