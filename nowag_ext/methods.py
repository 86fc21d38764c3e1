"""One record a method: what it is called, its settings, its weight, its module, its form on disk.

Whatever depends on the method, from the command line to the checkpoint, asks the record.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nowag_ext import ops
from nowag_ext.codebook import Codebook, check_name
from nowag_ext.decoder import matches
from nowag_ext.linear import PackedLinear, PackedWeight, SparseLinear, VQLinear
from nowag_ext.prune import SparseWeight, kept_weights, prune
from nowag_ext.vq import VQWeight, bits_of, check_code, check_iterations, vq_compress

# Called with the share of one layer that is done, from 0 to 1.
LayerProgress = Callable[[float], None]


@dataclass(frozen=True)
class Given:
    """What is known of a layer besides its activation norms (``vq_compress``, ``prune``).

    Attributes:
        hessian: E[x x^T] of its inputs, fp32 [in_features, in_features].
        extra: correction of the target, fp32 [out_features, in_features].
        codebook: that it shares with other layers.
    """

    hessian: Tensor | None = None
    extra: Tensor | None = None
    codebook: Codebook | None = None


NOTHING = Given()

_LONGEST_PATTERN = 16  # characters of "N:M"


@dataclass(frozen=True)
class Settings(ABC):
    """The settings of a method, under the names of its function's keywords."""

    method: ClassVar[str]

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError for settings that no layer can have."""

    @abstractmethod
    def check_layer(
        self, out_features: int, in_features: int, shared_codebook: bool = False
    ) -> None:
        """Raises ValueError for a layer that these settings do not fit: "is too small: ..."."""

    @abstractmethod
    def compress(
        self, weight: Tensor, act_norms: Tensor, progress: LayerProgress, given: Given = NOTHING
    ) -> PackedWeight:
        """The packed form of one layer's weight."""

    def values_with(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting by name, with these changes."""
        return {**asdict(self), **changes}

    @abstractmethod
    def form(self) -> dict[str, Any]:
        """What a reader of the checkpoint must know: fields of its group."""


@dataclass(frozen=True)
class VQSettings(Settings):
    """Settings of ``vq_compress``, under its names."""

    method: ClassVar[str] = "vq"

    d: int = 6
    bits: float = 2
    iters: int = 100
    n_init: int = 1
    init: str = "kmeans++"
    seed: int = 0

    def check(self) -> None:
        check_code(self.d, self.bits)
        check_iterations(self.iters, self.n_init, self.init, self.seed)

    def check_layer(
        self, out_features: int, in_features: int, shared_codebook: bool = False
    ) -> None:
        """Raises ValueError for a layer with fewer sub-vectors than entries of its codebook."""
        code_bits = check_code(self.d, self.bits)
        vectors = out_features * ops.code_positions(in_features, self.d)
        if vectors < 2**code_bits and not shared_codebook:
            raise ValueError(
                f"is too small: its {out_features} x {in_features} weights are {vectors} "
                f"sub-vectors of {self.d}, fewer than the {2**code_bits} codebook entries of "
                f"{code_bits}-bit codes. Use a smaller d * bits, or ignore the layer"
            )

    def compress(
        self, weight: Tensor, act_norms: Tensor, progress: LayerProgress, given: Given = NOTHING
    ) -> VQWeight:
        def on_iteration(iteration: int, iters: int, _objective: float) -> None:
            progress(min(1.0, iteration / iters))

        return vq_compress(
            weight, act_norms, **asdict(self), codebook=given.codebook, hessian=given.hessian,
            extra=given.extra, progress=on_iteration,
        )  # fmt: skip

    def form(self) -> dict[str, Any]:
        return {"d": self.d, "code_bits": check_code(self.d, self.bits)}


@dataclass(frozen=True)
class PruneSettings(Settings):
    """Settings of ``prune``, under its names; neither given means half of the weights."""

    method: ClassVar[str] = "prune"

    sparsity: float | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.sparsity is None and self.pattern is None:
            object.__setattr__(self, "sparsity", 0.5)

    def values_with(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The changes alone, if any: sparsity and pattern exclude each other."""
        return dict(changes) or asdict(self)

    def check(self) -> None:
        multiple = str(self.pattern).partition(":")[2]
        in_features = int(multiple) if multiple.isdecimal() and int(multiple) > 0 else 1
        kept_weights(in_features, 1, self.sparsity, self.pattern)

    def check_layer(
        self, out_features: int, in_features: int, shared_codebook: bool = False
    ) -> None:
        """Raises ValueError for a layer whose inputs are no multiple of M."""
        try:
            kept_weights(in_features, out_features, self.sparsity, self.pattern)
        except ValueError as error:
            raise ValueError(f"cannot be pruned: {str(error).rstrip('.')}") from None

    def compress(
        self, weight: Tensor, act_norms: Tensor, progress: LayerProgress, given: Given = NOTHING
    ) -> SparseWeight:
        return prune(weight, act_norms, **asdict(self), hessian=given.hessian, extra=given.extra)

    def form(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Method:
    """What there is to know about one way of compressing.

    Attributes:
        name: on the command line, in configurations and reports.
        label: in words.
        settings: the class of its settings.
        weight: the class of its packed weight.
        module: the class of the linear layer of such a weight.
        forms: the sets of fields that a checkpoint's group may have.
        check_form: raises ValueError for values of those fields that no layer has.
        empty: (form, in_features, out_features, dtype of the dense weight, device) -> a module to
            load such a weight into, without bias; raises ValueError for a form that cannot be.
    """

    name: str
    label: str
    settings: type[Settings]
    weight: type[PackedWeight]
    module: type[PackedLinear]
    forms: tuple[frozenset[str], ...]
    check_form: Callable[[Mapping[str, Any]], None]
    empty: Callable[[Mapping[str, Any], int, int, torch.dtype, torch.device], PackedLinear]


def _check_vq(form: Mapping[str, Any]) -> None:
    limits = {"d": ops.MAX_SUBVECTOR, "code_bits": ops.MAX_CODE_BITS}
    for name, most in limits.items():
        value = form[name]
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} must be an integer from 1 to {most}, not {value!r:.80}.")
    if "codebook" in form:
        check_name(form["codebook"])
    if "embedding" in form and (
        not isinstance(form["embedding"], str) or len(form["modules"]) != 1
    ):
        raise ValueError("embedding must be the name of a module that is tied to one other.")


def _check_sparse(form: Mapping[str, Any]) -> None:
    sparsity, pattern = form.get("sparsity"), form.get("pattern")
    if "sparsity" in form and type(sparsity) not in (int, float):
        raise ValueError(f"sparsity must be a number, not {sparsity!r:.80}.")
    if "pattern" in form and (type(pattern) is not str or len(pattern) > _LONGEST_PATTERN):
        raise ValueError(f'pattern must be "N:M", not {pattern!r:.80}.')
    PruneSettings(sparsity, pattern).check()


def _empty_vq(
    form: Mapping[str, Any],
    in_features: int,
    out_features: int,
    _dtype: torch.dtype,
    device: torch.device,
) -> VQLinear:
    return VQLinear(
        in_features,
        out_features,
        d=form["d"],
        bits=bits_of(form["d"], form["code_bits"]),
        device=device,
        codebook_name=form.get("codebook"),
    )


def _empty_sparse(
    form: Mapping[str, Any],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
) -> SparseLinear:
    return SparseLinear(
        in_features,
        out_features,
        sparsity=form.get("sparsity"),
        pattern=form.get("pattern"),
        dtype=dtype,
        device=device,
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="vq",
            label="vector quantisation",
            settings=VQSettings,
            weight=VQWeight,
            module=VQLinear,
            forms=(
                frozenset({"d", "code_bits"}),
                frozenset({"d", "code_bits", "codebook"}),
                frozenset({"d", "code_bits", "embedding"}),
            ),
            check_form=_check_vq,
            empty=_empty_vq,
        ),
        Method(
            name="prune",
            label="pruning",
            settings=PruneSettings,
            weight=SparseWeight,
            module=SparseLinear,
            forms=(frozenset({"sparsity"}), frozenset({"pattern"})),
            check_form=_check_sparse,
            empty=_empty_sparse,
        ),
    )
}


def method_named(name: Any) -> Method:
    """The record of a method; raises ValueError if there is none of that name."""
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {name!r}.")
    return METHODS[name]


def make_settings(method: str, given: Mapping[str, Any]) -> Settings:
    """The checked settings of a method, defaults filled in.

    Raises:
        ValueError: no such method, or a value out of range.
        TypeError: a setting that the method does not have.
    """
    kind = method_named(method).settings
    names = [field.name for field in fields(kind)]
    for name in given:
        if name not in names:
            raise TypeError(
                f"method {method!r} has no setting {name!r}: it has {', '.join(names)}."
            )
    settings = kind(**given)
    settings.check()
    return settings


class LayerSettings:
    """The checked settings of every layer: a method's, and others where a pattern names a layer.

    Args:
        method: name and settings for what no pattern names.
        overrides: by pattern, what differs (``compress_model``). Of several patterns that name a
            layer the last counts.

    Raises:
        ValueError, TypeError: unfit settings; the sentence names the pattern.
    """

    def __init__(
        self,
        method: str,
        settings: Mapping[str, Any],
        overrides: Mapping[str, Mapping[str, Any]],
    ) -> None:
        if not isinstance(overrides, Mapping):
            raise TypeError(
                "overrides must map patterns to settings, such as "
                f"{{'down_proj': {{'bits': 3}}}}, not be of type {type(overrides).__name__}."
            )
        self.default = make_settings(method, settings)
        self._others = {
            pattern: self._changed(pattern, changes) for pattern, changes in overrides.items()
        }

    def _changed(self, pattern: str, changes: Mapping[str, Any]) -> Settings:
        if not isinstance(pattern, str) or not isinstance(changes, Mapping):
            raise TypeError(
                f"override {pattern!r} must be a pattern and a mapping of settings, "
                f"not {changes!r:.100}."
            )
        method = changes.get("method", self.default.method)
        given = {name: value for name, value in changes.items() if name != "method"}
        if method == self.default.method:
            given = self.default.values_with(given)
        try:
            return make_settings(method, given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"override {pattern!r}: {error}") from None

    def of(self, name: str) -> Settings:
        """The settings of the layer of this name."""
        found = [other for pattern, other in self._others.items() if matches(name, [pattern])]
        return found[-1] if found else self.default


def packed_linear(method: str, weight: PackedWeight, bias: nn.Parameter | None) -> PackedLinear:
    """The module of a compressed weight, sharing its tensors."""
    return METHODS[method].module.from_weight(weight, bias)
