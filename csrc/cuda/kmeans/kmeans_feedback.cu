#include <algorithm>

#include "cuda/base/dispatch.h"
#include "cuda/base/launch.h"
#include "cuda/kmeans/kmeans_feedback.cuh"

namespace nowag::cuda {

int64_t kmeans_feedback_workspace(float*, int64_t, float*, const float*, int64_t, const float*,
                                  int64_t, int64_t, int64_t, int, uint16_t*, double, int64_t*) {
    return 0;
}

Status kmeans_feedback(float* x, int64_t x_stride, float* carried, const float* factor,
                       int64_t factor_stride, const float* codebook, int64_t rows,
                       int64_t positions, int64_t entries, int d, uint16_t* codes, double scale,
                       int64_t* sums, void*, Stream stream) {
    if (rows < 1 || positions < 1 || entries < 1 || entries > (int64_t{1} << kMaxCodeBits) ||
        x_stride < positions * d || factor_stride < positions * d) {
        return Status::invalid_argument;
    }
    const FeedbackOperands operands{x,    x_stride,  carried, factor, factor_stride, codebook,
                                    rows, positions, codes,   scale,  sums};
    // Fewer rows a block where all of them would leave multiprocessors without.
    const int64_t share = ceil_div(rows, device_limits().multiprocessors);
    const auto rows_of_block = static_cast<int>(std::min<int64_t>(share, kMostFeedbackRows));
    return with_subvector(d, [&](auto subvector) {
        constexpr int kD = subvector.value;
        int group_threads = kWarpSize;
        while (group_threads < kFeedbackThreads && group_threads * kFeedbackOwn<kD> < entries) {
            group_threads *= 2;
        }
        return launch(kmeans_feedback_rows<kD>, blocks_for(rows, rows_of_block), kFeedbackThreads,
                      sizeof(FeedbackShared<kD>), stream, operands, static_cast<int>(entries),
                      rows_of_block, group_threads);
    });
}

}  // namespace nowag::cuda
