"""The settings of each method: their names and defaults, and what makes them unfit for a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from nowag_ext import ops
from nowag_ext.linear import SparseLinear, VQLinear
from nowag_ext.prune import SparseWeight, kept_weights, prune
from nowag_ext.vq import VQWeight, vq_compress

PackedWeight = VQWeight | SparseWeight
PackedLinear = VQLinear | SparseLinear

# Called with the share of one layer that is done, from 0 to 1.
LayerProgress = Callable[[float], None]

_INITS = ("kmeans++", "random")


@dataclass(frozen=True)
class VQSettings:
    """Settings of ``vq_compress``, under its names."""

    method: ClassVar[str] = "vq"

    d: int = 6
    bits: float = 2
    iters: int = 100
    n_init: int = 1
    init: str = "kmeans++"
    seed: int = 0

    @property
    def code_bits(self) -> int:
        return round(self.d * self.bits)

    def check(self) -> None:
        """Raises ValueError for settings that no layer can have."""
        if not isinstance(self.d, int) or not 1 <= self.d <= ops.MAX_SUBVECTOR:
            raise ValueError(f"d must be an integer from 1 to {ops.MAX_SUBVECTOR}, not {self.d!r}.")
        code_bits = self.d * self.bits
        if not math.isfinite(code_bits) or not math.isclose(code_bits, round(code_bits)):
            raise ValueError(
                f"d * bits must be an integer, not {self.d} * {self.bits} = {code_bits}."
            )
        if not 1 <= self.code_bits <= ops.MAX_CODE_BITS:
            raise ValueError(
                f"d * bits must be from 1 to {ops.MAX_CODE_BITS}, not "
                f"{self.d} * {self.bits} = {code_bits}."
            )
        for name, least in (("iters", 1), ("n_init", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value < 2**63:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}.")
        if self.init not in _INITS:
            raise ValueError(f"init must be one of {', '.join(_INITS)}, not {self.init!r}.")

    def check_layer(self, out_features: int, in_features: int) -> None:
        """Raises ValueError for a layer with fewer sub-vectors than codebook entries."""
        entries = 2**self.code_bits
        vectors = out_features * ops.code_positions(in_features, self.d)
        if vectors < entries:
            raise ValueError(
                f"is too small: its {out_features} x {in_features} weights are {vectors} "
                f"sub-vectors of {self.d}, fewer than the {entries} codebook entries of "
                f"{self.code_bits}-bit codes. Use a smaller d * bits, or ignore the layer"
            )

    def compress(self, weight: Tensor, act_norms: Tensor, progress: LayerProgress) -> VQWeight:
        def on_iteration(iteration: int, iters: int, _objective: float) -> None:
            progress(min(1.0, iteration / iters))

        return vq_compress(weight, act_norms, **asdict(self), progress=on_iteration)

    def format_fields(self) -> dict[str, Any]:
        """What a reader of the checkpoint must know."""
        return {"d": self.d, "code_bits": self.code_bits}


@dataclass(frozen=True)
class PruneSettings:
    """Settings of ``prune``, under its names; neither given means half of the weights."""

    method: ClassVar[str] = "prune"

    sparsity: float | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.sparsity is None and self.pattern is None:
            object.__setattr__(self, "sparsity", 0.5)

    def check(self) -> None:
        """Raises ValueError for settings that no layer can have."""
        multiple = str(self.pattern).partition(":")[2]
        in_features = int(multiple) if multiple.isdecimal() and int(multiple) > 0 else 1
        kept_weights(in_features, 1, self.sparsity, self.pattern)

    def check_layer(self, out_features: int, in_features: int) -> None:
        """Raises ValueError for a layer whose inputs are no multiple of M."""
        try:
            kept_weights(in_features, out_features, self.sparsity, self.pattern)
        except ValueError as error:
            raise ValueError(f"cannot be pruned: {str(error).rstrip('.')}") from None

    def compress(self, weight: Tensor, act_norms: Tensor, progress: LayerProgress) -> SparseWeight:
        if self.pattern is not None:
            return prune(weight, act_norms, pattern=self.pattern)
        return prune(weight, act_norms, sparsity=self.sparsity)

    def format_fields(self) -> dict[str, Any]:
        """What a reader of the checkpoint must know."""
        if self.pattern is not None:
            return {"pattern": self.pattern}
        return {"sparsity": self.sparsity}


Settings = VQSettings | PruneSettings
METHODS: dict[str, type[VQSettings] | type[PruneSettings]] = {
    "vq": VQSettings,
    "prune": PruneSettings,
}


def make_settings(method: str, given: dict[str, Any]) -> Settings:
    """The checked settings of a method, defaults filled in.

    Raises:
        ValueError: no such method, or a value out of range.
        TypeError: a setting that the method does not have.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    kind = METHODS[method]
    names = [field.name for field in fields(kind)]
    for name in given:
        if name not in names:
            raise TypeError(
                f"method {method!r} has no setting {name!r}: it has {', '.join(names)}."
            )
    settings = kind(**given)
    settings.check()
    return settings


def packed_linear(weight: PackedWeight, bias: nn.Parameter | None) -> PackedLinear:
    """The module of a compressed weight, sharing its tensors."""
    if isinstance(weight, VQWeight):
        return VQLinear.from_weight(weight, bias)
    return SparseLinear.from_weight(weight, bias)
