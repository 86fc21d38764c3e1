// The one list of operations, each with its stem: EACH(stem, name).
//
// The stem names the files: nowag/<stem>.h, the contract; csrc/cpu/<room>/<stem>*.cpp and
// csrc/cuda/<room>/<stem>*.cu, the room being the stem's first word. CMake reads the list for them
// (cmake/operations.cmake); both modules of bindings/ and the host SIMT executor (tests/simt) take
// the names from it. Operations that the CPU alone has are listed apart: ALONE(stem, name).
#pragma once

#include "nowag/kmeans.h"
#include "nowag/kmeans_feedback.h"
#include "nowag/normalize.h"
#include "nowag/prune.h"
#include "nowag/sparse_gemv.h"
#include "nowag/sparse_pack.h"
#include "nowag/tape.h"
#include "nowag/vq_gemv.h"
#include "nowag/vq_pack.h"

#define NOWAG_OPERATIONS(EACH)             \
    EACH(normalize, normalize)             \
    EACH(kmeans, kmeans_assign)            \
    EACH(kmeans, kmeans_update)            \
    EACH(kmeans, kmeans_errors)            \
    EACH(kmeans, kmeans_spread)            \
    EACH(kmeans, kmeans_merge_costs)       \
    EACH(kmeans, kmeans_energy)            \
    EACH(kmeans, kmeans_seed)              \
    EACH(kmeans_feedback, kmeans_feedback) \
    EACH(prune, prune_select)              \
    EACH(prune, prune_select_nm)           \
    EACH(prune, prune_objective)           \
    EACH(vq_pack, pack_codes)              \
    EACH(vq_pack, unpack_codes)            \
    EACH(vq_pack, vq_dequantize)           \
    EACH(vq_pack, vq_gather)               \
    EACH(sparse_pack, sparse_offsets)      \
    EACH(sparse_pack, sparse_pack)         \
    EACH(sparse_pack, sparse_dequantize)   \
    EACH(vq_gemv, vq_gemv)                 \
    EACH(vq_gemv, vq_gemv_group)           \
    EACH(sparse_gemv, sparse_gemv)

#define NOWAG_CPU_OPERATIONS(ALONE)         \
    ALONE(kmeans, kmeans_assign_exhaustive) \
    ALONE(tape, tape_run)
