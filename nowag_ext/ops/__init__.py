"""The one caller of the compiled modules: torch.library schemas, fakes, checks, output allocation.

Every operation is a ``torch.ops.nowag.*`` op under the name of its header in
``csrc/include/nowag``, which states the math, the layouts and the tie rules; the names here are
those ops. One file a header, and what they share: ``registry`` (schemas, the compiled modules),
``checks``, ``format`` (the packed form), ``linear`` (tiles) and ``linear_autograd`` (derivatives).
Addresses, sizes and the number of threads (CPU) or the stream (CUDA) go to the compiled module as
integers; it returns nothing and raises on a bad status.
"""

from importlib.util import find_spec
from pathlib import Path

if find_spec("nowag_ext._cpu") is None:
    raise ImportError(
        f"there are no compiled kernels in {Path(__file__).parents[1]}: these are the sources, "
        "which hide an installed nowag_ext from Python when it is started in their folder. Start "
        "it in another folder, or put the kernels here with `pip install -e .`"
    )

from nowag_ext.ops.format import (
    FORMAT_VERSION,
    MAX_CODE_BITS,
    MAX_GROUP,
    MAX_SUBVECTOR,
    TILE_ROWS,
    bitmap_shape,
    code_positions,
    packed_shape,
)
from nowag_ext.ops.kmeans import (
    kmeans_assign,
    kmeans_assign_exhaustive,
    kmeans_energy,
    kmeans_errors,
    kmeans_merge_costs,
    kmeans_scale,
    kmeans_seed,
    kmeans_spread,
    kmeans_update,
)
from nowag_ext.ops.kmeans_feedback import feedback_sums_columns, kmeans_feedback
from nowag_ext.ops.linear import GEMV_MAX_TOKENS, VQ_MAX_MEMBERS
from nowag_ext.ops.normalize import normalize
from nowag_ext.ops.prune import prune_objective, prune_select, prune_select_nm
from nowag_ext.ops.registry import needs_dispatcher
from nowag_ext.ops.sparse_gemv import (
    run_sparse_gemv,
    sparse_gemv,
    sparse_linear,
    sparse_linear_call,
    sparse_linear_grad,
)
from nowag_ext.ops.sparse_pack import sparse_dequantize, sparse_offsets, sparse_pack
from nowag_ext.ops.vq_gemv import (
    run_vq_gemv,
    vq_gemv,
    vq_gemv_group,
    vq_linear,
    vq_linear_grad,
    vq_linears_call,
)
from nowag_ext.ops.vq_pack import pack_codes, unpack_codes, vq_dequantize, vq_gather

__all__ = [
    "FORMAT_VERSION",
    "GEMV_MAX_TOKENS",
    "MAX_CODE_BITS",
    "MAX_GROUP",
    "MAX_SUBVECTOR",
    "TILE_ROWS",
    "VQ_MAX_MEMBERS",
    "bitmap_shape",
    "code_positions",
    "feedback_sums_columns",
    "kmeans_assign",
    "kmeans_assign_exhaustive",
    "kmeans_energy",
    "kmeans_errors",
    "kmeans_feedback",
    "kmeans_merge_costs",
    "kmeans_scale",
    "kmeans_seed",
    "kmeans_spread",
    "kmeans_update",
    "needs_dispatcher",
    "normalize",
    "pack_codes",
    "packed_shape",
    "prune_objective",
    "prune_select",
    "prune_select_nm",
    "run_sparse_gemv",
    "run_vq_gemv",
    "sparse_dequantize",
    "sparse_gemv",
    "sparse_linear",
    "sparse_linear_call",
    "sparse_linear_grad",
    "sparse_offsets",
    "sparse_pack",
    "unpack_codes",
    "vq_dequantize",
    "vq_gather",
    "vq_gemv",
    "vq_gemv_group",
    "vq_linear",
    "vq_linear_grad",
    "vq_linears_call",
]
