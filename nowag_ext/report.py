"""What a compression did, layer by layer and in all, and its JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import resource
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# Bytes of a report that is read: one of 100,000 layers has fewer.
_LARGEST = 256 << 20

# What a checkpoint has beside its weights.
REPORT_FILE = "report.json"
LAYERS_FILE = "layers.csv"

# Called with what is being done, how much is done, and how much there is (0: not known), both in
# the same unit: batches when calibrating, weights when compressing.
Progress = Callable[[str, float, float], None]


def settings_text(settings: Mapping[str, Any]) -> str:
    """The settings that have a value, in one line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


@dataclass(frozen=True)
class LayerReport:
    """One compressed linear layer.

    Attributes:
        method, settings: how it was compressed, defaults included.
        relative_objective: sum h (Wn - Q)^2 / sum h Wn^2 with what is stored (rounded to fp16).
        bits_per_weight: everything stored for the layer but its bias and a shared codebook.
        seconds: what compressing it took; if ``resumed``, in the run that did.
        peak_memory: the process's largest resident size so far, in bytes.
        resumed: taken from the work directory of an earlier, interrupted run.
        dead_inputs: inputs whose act_norms are 0: the calibration text never reached them.
        damping, effective_rank: of the layer's Hessian (``hessian.Factor``); None where there was
            none. Far fewer calibration tokens than the rank cannot say what the Hessian is.
    """

    name: str
    method: str
    settings: dict[str, Any]
    out_features: int
    in_features: int
    relative_objective: float
    bits_per_weight: float
    bytes: int
    seconds: float
    peak_memory: int
    resumed: bool
    dead_inputs: int = 0
    damping: float | None = None
    effective_rank: float | None = None

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Distillation:
    """How a compressed model was tuned to predict what the dense one does (``distill``).

    Attributes:
        passes: through a text of so many ``tokens``.
        learning_rate, seed: as given.
        divergences: of each pass, the mean KL(dense || compressed) in nats, of each window just
            before its step.
        seconds: wall time of this run.
        peak_memory: the process's largest resident size so far, in bytes.
    """

    passes: int
    tokens: int
    learning_rate: float
    seed: int
    divergences: tuple[float, ...]
    seconds: float
    peak_memory: int = 0


def peak_memory() -> int:
    """This process's largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def distillation_text(learnt: Distillation) -> str:
    """How near the compressed model came to the dense one, in one line."""
    fell = ", ".join(f"{divergence:.4f}" for divergence in learnt.divergences)
    passes = "1 pass" if learnt.passes == 1 else f"{learnt.passes} passes"
    return (
        f"{passes} of {learnt.tokens} tokens; KL to the dense model in nats, of each window just "
        f"before its step, a mean a pass: {fell}"
    )


@dataclass(frozen=True)
class ModelReport:
    """A whole model's compression.

    Attributes:
        method, settings: of every layer that no override names, defaults included.
        layers: the compressed layers in the model's order.
        decoder_weights: weights of two or more dimensions in the decoder layers.
        ignored: linears left out because a pattern of ``ignore`` names them.
        not_reached: parameters of the decoder layers that are no ``nn.Linear``'s weight.
        seconds: wall time of this run.
        versions: of nowag_ext, torch and transformers.
        codebook_bytes: of the codebooks that layers share.
        stages: seconds by what was done, where the run goes through several.
        calibration_tokens: that Hessians are means over; 0 where there are none.
        distillation: what came after, if it did; objectives are those before it.
        head: the lm_head, if that is packed too; totals are those without it.
    """

    method: str
    settings: dict[str, Any]
    layers: tuple[LayerReport, ...]
    decoder_weights: int
    ignored: tuple[str, ...]
    not_reached: tuple[str, ...]
    seconds: float
    versions: dict[str, str]
    codebook_bytes: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    calibration_tokens: int = 0
    distillation: Distillation | None = None
    head: LayerReport | None = None

    @property
    def compressed_weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def coverage(self) -> float:
        """Share of the decoder layers' weights that is compressed."""
        return self.compressed_weights / self.decoder_weights

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that stand for compressed weights."""
        return sum(layer.bytes for layer in self.layers) + self.codebook_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.compressed_weights

    @property
    def bits_per_weight_with_head(self) -> float:
        """All in, the head (and the embedding that is tied to it) counted where it is packed."""
        if self.head is None:
            return self.bits_per_weight
        size = self.bytes + self.head.bytes
        return 8 * size / (self.compressed_weights + self.head.weights)

    @property
    def mean_relative_objective(self) -> float:
        """Mean over the layers, each counting once."""
        return sum(layer.relative_objective for layer in self.layers) / len(self.layers)

    @property
    def tokens_per_input(self) -> float:
        """Calibration tokens for each input of the widest layer: its Hessian's rank is no more."""
        return self.calibration_tokens / max(layer.in_features for layer in self.layers)

    @property
    def dead_inputs(self) -> int:
        """Inputs of all layers that the calibration text never reached."""
        return sum(layer.dead_inputs for layer in self.layers)

    @property
    def peak_memory(self) -> int:
        """The largest resident size of all that has been done, in bytes."""
        parts = [*self.layers, self.head, self.distillation]
        return max(part.peak_memory for part in parts if part is not None)

    def to_json(self) -> str:
        """Totals, settings, versions and layers as a JSON object."""
        totals = {
            "bits_per_weight": self.bits_per_weight,
            "bits_per_weight_with_head": self.bits_per_weight_with_head,
            "mean_relative_objective": self.mean_relative_objective,
            "coverage": self.coverage,
            "compressed_weights": self.compressed_weights,
            "bytes": self.bytes,
            "dead_inputs": self.dead_inputs,
            "peak_memory": self.peak_memory,
        }
        return json.dumps({**totals, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelReport:
        """The inverse of ``to_json``, for reports of earlier releases too."""
        stored = json.loads(text)
        known = {field.name: stored[field.name] for field in fields(cls) if field.name in stored}
        everywhere = {"method": stored["method"], "settings": stored["settings"]}
        known["layers"] = tuple(LayerReport(**{**everywhere, **one}) for one in known["layers"])
        if known.get("head") is not None:
            known["head"] = LayerReport(**known["head"])
        known["ignored"] = tuple(known["ignored"])
        known["not_reached"] = tuple(known["not_reached"])
        if known.get("distillation") is not None:
            learnt = known["distillation"]
            known["distillation"] = Distillation(
                **{**learnt, "divergences": tuple(learnt["divergences"])}
            )
        return cls(**known)

    @classmethod
    def read(cls, file: Path) -> ModelReport | None:
        """The report in a file, or None where there is none, or one that says what none can say."""
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return None
        try:
            report = cls.from_json(file.read_text(encoding="utf-8"))
            report.to_csv()
            numbers = [
                report.bits_per_weight_with_head, report.mean_relative_objective, report.coverage
            ]  # fmt: skip
            learnt = report.distillation
            if learnt is not None:
                numbers += [learnt.passes, learnt.tokens, learnt.learning_rate, learnt.seed]
                numbers += [*learnt.divergences, learnt.seconds, learnt.peak_memory]
            versions = all(re.fullmatch(r"[\w.+-]{1,80}", one) for one in report.versions.values())
            sound = versions and all(math.isfinite(number) for number in numbers)
        except Exception:  # whatever stands there
            return None
        return report if sound else None

    def to_csv(self) -> str:
        """One line a layer, the head last, with a header."""
        text = io.StringIO()
        writer = csv.DictWriter(
            text, [field.name for field in fields(LayerReport)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(
            {**asdict(layer), "settings": settings_text(layer.settings)}
            for layer in (*self.layers, *([] if self.head is None else [self.head]))
        )
        return text.getvalue()
