"""NoWag: one-shot vector quantisation and pruning, with kernels for the packed form.

Importing the package makes transformers read its checkpoints, without importing transformers: what
needs it is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nowag_ext.startup import begin

begin()  # before torch is imported

# ruff: noqa: E402
from nowag_ext.calibrate import (
    CalibrationStatistics,
    calibrate,
    collect_statistics,
    load_act_norms,
)
from nowag_ext.codebook import Codebook
from nowag_ext.codebook_training import train_codebook
from nowag_ext.integrations import register_with_transformers
from nowag_ext.linear import SparseLinear, VQLinear
from nowag_ext.prune import SparseWeight, prune
from nowag_ext.report import Distillation, LayerReport, ModelReport
from nowag_ext.version import __version__
from nowag_ext.vq import VQWeight, vq_compress

if TYPE_CHECKING:
    from nowag_ext.checkpoint import (
        load,
        load_dense_model,
        save_compressed,
        save_dense,
        to_dense,
    )
    from nowag_ext.decoding import decode_graph
    from nowag_ext.disk import compress
    from nowag_ext.integrations.transformers import NowagConfig, NowagHfQuantizer
    from nowag_ext.model import compress_model
    from nowag_ext.pipeline.distill import distill
    from nowag_ext.sampling import self_text

__all__ = [
    "CalibrationStatistics",
    "Codebook",
    "Distillation",
    "LayerReport",
    "ModelReport",
    "NowagConfig",
    "NowagHfQuantizer",
    "SparseLinear",
    "SparseWeight",
    "VQLinear",
    "VQWeight",
    "__version__",
    "calibrate",
    "collect_statistics",
    "compress",
    "compress_model",
    "decode_graph",
    "distill",
    "load",
    "load_act_norms",
    "load_dense_model",
    "prune",
    "save_compressed",
    "save_dense",
    "self_text",
    "to_dense",
    "train_codebook",
    "vq_compress",
]

# Where the names are that need transformers.
_WHOLE_MODELS = {
    "NowagConfig": "integrations.transformers",
    "NowagHfQuantizer": "integrations.transformers",
    "compress": "disk",
    "compress_model": "model",
    "decode_graph": "decoding",
    "distill": "pipeline.distill",
    "load": "checkpoint",
    "load_dense_model": "checkpoint",
    "save_compressed": "checkpoint",
    "save_dense": "checkpoint",
    "self_text": "sampling",
    "to_dense": "checkpoint",
}

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _WHOLE_MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHOLE_MODELS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
