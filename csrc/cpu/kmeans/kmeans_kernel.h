// The loops of k-means, written once over Lanes (kmeans_lanes_*.h) and compiled for each
// instruction set. Everything is in an anonymous namespace, and nothing comes from the standard
// library, so that no instruction set's copy is ever linked in place of another's.
#pragma once

#include "cpu/kmeans/kmeans_deep.h"
#include "cpu/kmeans/kmeans_table.h"
#include "cpu/kmeans/kmeans_wide.h"
#include "nowag/format.h"

namespace nowag::cpu {
namespace {

void collect(const float* points, int64_t stride, const int32_t* rows, int64_t count, int d,
             float* x) {
    for (int64_t i = 0; i < count; i += Lanes::kWidth) {
        for (int first = 0; first < d; first += 4) {
            Float column[4];
            Lanes::columns(points + first, stride, rows + i, column);
            for (int j = first; j < d && j < first + 4; ++j) {
                Lanes::store(x + j * count + i, column[j - first]);
            }
        }
    }
}

// sum h c^2 of every slot.
template <int D>
void frame_bias(const KmeansLeaves& leaves, int64_t entries, const float* h, float* bias) {
    for (int64_t leaf = 0; leaf < leaves.count; ++leaf) {
        const float* c = leaves.c + leaf * D * kLeafEntries;
        for (int e = 0; e < kLeafEntries; e += Lanes::kWidth) {
            Float sum = Lanes::all(0.0f);
            for (int j = 0; j < D; ++j) {
                const Float value = Lanes::load(c + j * kLeafEntries + e);
                sum = Lanes::fma(Lanes::mul(Lanes::all(h[j]), value), value, sum);
            }
            Lanes::store(bias + leaf * kLeafEntries + e, sum);
        }
    }
    for (int64_t slot = entries; slot < leaves.count * kLeafEntries; ++slot) {
        bias[slot] = __builtin_inff();
    }
}

// A position's metric, and whether its searches go by the grid of the many leaves.
template <int D>
struct Metric {
    float root[D];
    bool deep;

    Metric(const KmeansLeaves& leaves, const float* h, KmeansStart start) {
        for (int j = 0; j < D; ++j) root[j] = __builtin_sqrtf(h[j]);
        deep = start != KmeansStart::exhaustive && leaves.count >= kManyLeaves &&
               Scale<D>(leaves, root).steps > 0.0f;
    }
};

template <int D>
void frame_any(const KmeansLeaves& leaves, int64_t entries, const float* h, KmeansStart start,
               const KmeansFrame& frame) {
    const Metric<D> metric(leaves, h, start);
    frame_bias<D>(leaves, entries, h, frame.bias);
    if (metric.deep) {
        frame_grid<D>(leaves, entries, Scale<D>(leaves, metric.root), frame);
    } else {
        frame_boxes<D>(leaves, metric.root, frame);
    }
}

void frame(const KmeansLeaves& leaves, int64_t entries, int d, const float* h, KmeansStart start,
           const KmeansFrame& room) {
    constexpr decltype(&frame_any<1>) kByLength[kMaxSubvector] = {
        frame_any<1>, frame_any<2>, frame_any<3>, frame_any<4>,
        frame_any<5>, frame_any<6>, frame_any<7>, frame_any<8>};
    kByLength[d - 1](leaves, entries, h, start, room);
}

template <int D>
void search_any(const KmeansSlice& points, const KmeansLeaves& leaves, KmeansStart start,
                const KmeansFrame& frame, uint16_t* best, float* gaps) {
    const Metric<D> metric(leaves, points.h, start);
    const bool guided = start == KmeansStart::previous;
    if (metric.deep) {
        search_deep<D>(points, leaves, frame, Scale<D>(leaves, metric.root), guided, best);
    } else {
        search_wide<D>(points, leaves, frame, metric.root, guided, best, gaps);
    }
}

void search(const KmeansSlice& points, const KmeansLeaves& leaves, int d, KmeansStart start,
            const KmeansFrame& frame, uint16_t* best, float* gaps) {
    constexpr decltype(&search_any<1>) kByLength[kMaxSubvector] = {
        search_any<1>, search_any<2>, search_any<3>, search_any<4>,
        search_any<5>, search_any<6>, search_any<7>, search_any<8>};
    kByLength[d - 1](points, leaves, start, frame, best, gaps);
}

// How far entry k moved in a position's metric, rounded up; entries is a multiple of the lanes or
// less than them.
void drift(const float* moves, int64_t entries, const float* h, int d, float* out) {
    float largest = 0.0f, runner_up = 0.0f;
    int64_t k = 0;
    Float most = Lanes::all(0.0f), next = most;
    for (; k + Lanes::kWidth <= entries; k += Lanes::kWidth) {
        Float sum = Lanes::all(0.0f);
        for (int j = 0; j < d; ++j) {
            const Float move = Lanes::load(moves + j * entries + k);
            sum = Lanes::fma(Lanes::mul(Lanes::all(h[j]), move), move, sum);
        }
        const Float length = Lanes::mul(Lanes::sqrt(sum), Lanes::all(kUp));
        Lanes::store(out + k, length);
        next = Lanes::max(next, Lanes::min(length, most));
        most = Lanes::max(length, most);
    }
    float lanes[2][Lanes::kWidth];
    Lanes::store(lanes[0], most);
    Lanes::store(lanes[1], next);
    const auto rank = [&](float length) {
        if (length > largest) {
            runner_up = largest;
            largest = length;
        } else if (length > runner_up) {
            runner_up = length;
        }
    };
    for (int lane = 0; lane < Lanes::kWidth; ++lane) {
        rank(lanes[0][lane]);
        rank(lanes[1][lane]);
    }
    for (; k < entries; ++k) {
        float sum = 0.0f;
        for (int j = 0; j < d; ++j) sum += h[j] * moves[j * entries + k] * moves[j * entries + k];
        out[k] = __builtin_sqrtf(sum) * kUp;
        rank(out[k]);
    }
    for (k = 0; k < entries; ++k) {
        const float other = out[k] == largest ? runner_up : largest;
        out[k] = (out[k] + other) * kUp;
    }
}

uint32_t shrink(const uint16_t* codes, const float* drift_of, int64_t entries, int count,
                float* gaps) {
    int32_t first[Lanes::kWidth];
    for (int lane = 0; lane < Lanes::kWidth; ++lane) {
        first[lane] = static_cast<int32_t>(lane * entries);
    }
    uint32_t spent = 0;
    int p = 0;
    for (; p + Lanes::kWidth <= count; p += Lanes::kWidth) {
        const Int index = Lanes::add(Lanes::load_codes(codes + p), Lanes::load_int(first));
        const Float loss = Lanes::gather(drift_of + p * entries, index);
        const Float gap = Lanes::sub(Lanes::mul(Lanes::load(gaps + p), Lanes::all(kDown)), loss);
        Lanes::store(gaps + p, gap);
        const uint32_t left = Lanes::bits(Lanes::less(Lanes::all(0.0f), gap));
        spent |= (~left & ((1u << Lanes::kWidth) - 1u)) << p;
    }
    for (; p < count; ++p) {
        gaps[p] = gaps[p] * kDown - drift_of[p * entries + codes[p]];
        if (!(gaps[p] > 0.0f)) spent |= 1u << p;
    }
    return spent;
}

// Rounds to nearest even by adding 2^52: values are below 2^41, so that the sum's last bits are the
// integer, and adding the bits of all sums adds the integers.
uint64_t sum_of_rounded(const float* values, int64_t count, double scale) {
    constexpr double kUnit = 0x1p52;
    constexpr uint64_t kUnitBits = 0x4330000000000000u;
    uint64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double shifted = static_cast<double>(values[i]) * scale + kUnit;
        uint64_t bits;
        __builtin_memcpy(&bits, &shifted, sizeof bits);
        total += bits - kUnitBits;
    }
    return total;
}

// The sum is taken over a chunk that is still in the first-level cache.
template <int D>
uint64_t narrow_to(const float* x, const float* h, int64_t stride, int64_t begin, int64_t end,
                   const float* entry, double scale, const float* nearest, float* narrowed) {
    constexpr int64_t kChunk = 1024;
    uint64_t total = 0;
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
        const int64_t chunk_end = chunk + kChunk < end ? chunk + kChunk : end;
        int64_t i = chunk;
        for (; i + Lanes::kWidth <= chunk_end; i += Lanes::kWidth) {
            Float sum = Lanes::all(0.0f);
            for (int j = 0; j < D; ++j) {
                const Float t = Lanes::sub(Lanes::load(x + j * stride + i), Lanes::all(entry[j]));
                sum = Lanes::fma(Lanes::mul(Lanes::load(h + j * stride + i), t), t, sum);
            }
            Lanes::store(narrowed + i, Lanes::min(sum, Lanes::load(nearest + i)));
        }
        for (; i < chunk_end; ++i) {
            float sum = 0.0f;
            for (int j = 0; j < D; ++j) {
                const float t = x[j * stride + i] - entry[j];
                sum = __builtin_fmaf(h[j * stride + i] * t, t, sum);
            }
            narrowed[i] = sum < nearest[i] ? sum : nearest[i];
        }
        total += sum_of_rounded(narrowed + chunk, chunk_end - chunk, scale);
    }
    return total;
}

uint64_t narrow(const float* x, const float* h, int64_t stride, int64_t begin, int64_t end,
                const float* entry, int d, double scale, const float* nearest, float* narrowed) {
    constexpr decltype(&narrow_to<1>) kByLength[kMaxSubvector] = {
        narrow_to<1>, narrow_to<2>, narrow_to<3>, narrow_to<4>,
        narrow_to<5>, narrow_to<6>, narrow_to<7>, narrow_to<8>};
    return kByLength[d - 1](x, h, stride, begin, end, entry, scale, nearest, narrowed);
}

float merge(const float* columns, int64_t entries, int64_t begin, int64_t end, const float* entry,
            const float* weights, int d) {
    Float lowest = Lanes::all(__builtin_inff());
    int64_t m = begin;
    for (; m + Lanes::kWidth <= end; m += Lanes::kWidth) {
        Float sum = Lanes::all(0.0f);
        for (int j = 0; j < d; ++j) {
            const Float t =
                Lanes::sub(Lanes::all(entry[j]), Lanes::load(columns + j * entries + m));
            sum = Lanes::fma(Lanes::mul(Lanes::all(weights[j]), t), t, sum);
        }
        lowest = Lanes::min(sum, lowest);
    }
    float cost = Lanes::lowest(lowest);
    for (; m < end; ++m) {
        float sum = 0.0f;
        for (int j = 0; j < d; ++j) {
            const float t = entry[j] - columns[j * entries + m];
            sum = __builtin_fmaf(weights[j] * t, t, sum);
        }
        if (sum < cost) cost = sum;
    }
    return cost;
}

template <int D>
void rotate_to(const float* x, int64_t stride, int64_t points, int64_t columns, const float* factor,
               int64_t factor_stride, float* y) {
    for (int64_t i = 0; i < points; i += Lanes::kWidth) {
        Float sum[D];
        for (int j = 0; j < D; ++j) sum[j] = Lanes::load(y + j * stride + i);
        for (int64_t c = 0; c < columns; ++c) {
            const Float value = Lanes::load(x + c * stride + i);
            const float* row = factor + c * factor_stride;
            for (int j = 0; j < D; ++j) sum[j] = Lanes::fma(value, Lanes::all(row[j]), sum[j]);
        }
        for (int j = 0; j < D; ++j) Lanes::store(y + j * stride + i, sum[j]);
    }
}

void rotate(const float* x, int64_t stride, int64_t points, int64_t columns, const float* factor,
            int64_t factor_stride, int d, float* y) {
    constexpr decltype(&rotate_to<1>) kByLength[kMaxSubvector] = {
        rotate_to<1>, rotate_to<2>, rotate_to<3>, rotate_to<4>,
        rotate_to<5>, rotate_to<6>, rotate_to<7>, rotate_to<8>};
    kByLength[d - 1](x, stride, points, columns, factor, factor_stride, y);
}

constexpr KmeansTable kTable = {collect, frame, search, drift, shrink, merge, narrow, rotate};

}  // namespace
}  // namespace nowag::cpu
