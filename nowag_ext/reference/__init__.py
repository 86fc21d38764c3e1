"""Every kernel again in plain PyTorch: the oracle of the tests, and nothing else.

Each function has the name of the operation in ``nowag_ext/ops``, lies in the file of its header,
and states the math of that header in ``csrc/include/nowag`` as directly as PyTorch can, on the CPU.
Where a header pins the rounding, so does the oracle.
"""

from nowag_ext.reference.feedback import feedback
from nowag_ext.reference.kmeans import (
    fma,
    kmeans,
    kmeans_assign,
    kmeans_energy,
    kmeans_errors,
    kmeans_merge_costs,
    kmeans_plus_plus,
    kmeans_points,
    kmeans_scores,
    kmeans_seed,
    kmeans_spread,
    kmeans_sums,
    kmeans_update,
)
from nowag_ext.reference.kmeans_feedback import kmeans_feedback
from nowag_ext.reference.normalize import EPS, normalize
from nowag_ext.reference.prune import prune_objective, prune_select, prune_select_nm, saliency
from nowag_ext.reference.sparse_gemv import sparse_linear
from nowag_ext.reference.sparse_pack import (
    from_bitmap,
    sparse_dequantize,
    sparse_offsets,
    sparse_pack,
    to_bitmap,
)
from nowag_ext.reference.vq_gemv import vq_linear
from nowag_ext.reference.vq_pack import (
    pack_codes,
    unpack_codes,
    vq_dequantize,
    vq_entries,
    vq_gather,
)

__all__ = [
    "EPS",
    "feedback",
    "fma",
    "from_bitmap",
    "kmeans",
    "kmeans_assign",
    "kmeans_energy",
    "kmeans_errors",
    "kmeans_feedback",
    "kmeans_merge_costs",
    "kmeans_plus_plus",
    "kmeans_points",
    "kmeans_scores",
    "kmeans_seed",
    "kmeans_spread",
    "kmeans_sums",
    "kmeans_update",
    "normalize",
    "pack_codes",
    "prune_objective",
    "prune_select",
    "prune_select_nm",
    "saliency",
    "sparse_dequantize",
    "sparse_linear",
    "sparse_offsets",
    "sparse_pack",
    "to_bitmap",
    "unpack_codes",
    "vq_dequantize",
    "vq_entries",
    "vq_gather",
    "vq_linear",
]
