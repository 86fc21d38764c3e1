"""NoWag: one-shot vector quantisation and pruning, with kernels for the packed form.

Importing the package registers its checkpoints with transformers.
"""

from nowag_ext.calibrate import (
    CalibrationStatistics,
    calibrate,
    collect_statistics,
    load_act_norms,
)
from nowag_ext.checkpoint import load, load_dense_model, save_compressed, save_dense, to_dense
from nowag_ext.integrations.transformers import NowagConfig, NowagHfQuantizer
from nowag_ext.linear import SparseLinear, VQLinear
from nowag_ext.model import compress_model
from nowag_ext.prune import SparseWeight, prune
from nowag_ext.report import LayerReport, ModelReport
from nowag_ext.version import __version__
from nowag_ext.vq import VQWeight, vq_compress

__all__ = [
    "CalibrationStatistics",
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
    "compress_model",
    "load",
    "load_act_norms",
    "load_dense_model",
    "prune",
    "save_compressed",
    "save_dense",
    "to_dense",
    "vq_compress",
]
