// Everything of kmeans.h that is cheap beside an assignment: update, errors, spread, merge costs,
// energy.
#include <algorithm>
#include <vector>

#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/kmeans/kmeans_points.h"
#include "cpu/kmeans/kmeans_table.h"

namespace nowag::cpu {
namespace {

double point_error(const float* x, const float* h, const float* c, int d) {
    double error = 0.0;
    for (int j = 0; j < d; ++j) {
        const double distance = static_cast<double>(x[j]) - static_cast<double>(c[j]);
        error += h[j] * distance * distance;
    }
    return error;
}

// Adds the points of one row to the spread of their entries.
void add_row_spread(const KmeansProblem& problem, int64_t row, int d, double scale,
                    int64_t* spread) {
    const int64_t positions = positions_of(problem, d);
    poll();
    for (int64_t p = 0; p < positions; ++p) {
        float x[kMaxSubvector];
        read_point(problem, row, p, d, x);
        const int64_t k = problem.codes[row * positions + p];
        const float* h = problem.h + p * d;
        for (int j = 0; j < d; ++j) {
            const double distance = static_cast<double>(x[j]) - problem.codebook[k * d + j];
            add_to(spread[k * d + j], fixed_point(h[j] * distance * distance * scale));
        }
    }
}

// Terms added up in runs of kKmeansTermRun.
class TermSum {
  public:
    void add(double term) {
        run_ += term;
        if (++terms_ == kKmeansTermRun) end_run();
    }

    double total() {
        if (terms_ > 0) end_run();
        return total_;
    }

  private:
    void end_run() {
        total_ += run_;
        run_ = 0.0;
        terms_ = 0;
    }

    double total_ = 0.0, run_ = 0.0;
    int terms_ = 0;
};

double row_energy(const KmeansProblem& problem, int64_t row) {
    const float* x = problem.w + row * problem.cols;
    double energy = 0.0;
    for (int64_t j = 0; j < problem.cols; ++j) {
        energy += static_cast<double>(problem.h[j]) * x[j] * x[j];
    }
    return energy;
}

}  // namespace

Status kmeans_update(const int64_t* sums, int64_t entries, int d, double scale, float* codebook,
                     double* objective_drop, uint8_t* empty, int /*threads*/) {
    if (!valid_entries(entries) || d < 1 || d > kMaxSubvector) return Status::invalid_argument;
    TermSum drop;
    for (int64_t k = 0; k < entries; ++k) {
        const int64_t* sum = sums + k * (2 * d + 1);
        float* c = codebook + k * d;
        empty[k] = sum[2 * d] == 0;
        for (int j = 0; j < d; ++j) {
            const double numerator = static_cast<double>(sum[j]);
            const double denominator = static_cast<double>(sum[d + j]);
            if (sum[d + j] > 0) c[j] = static_cast<float>(numerator / denominator);
            const double value = c[j];
            drop.add((2.0 * value * numerator - value * value * denominator) / scale);
        }
    }
    *objective_drop = drop.total();
    return Status::ok;
}

Status kmeans_errors(const KmeansProblem* problems, int64_t count, int64_t entries, int d,
                     float* errors, int threads) try {
    if (count != 1 || !valid_points(problems[0], d) || !valid_entries(entries) || threads < 1) {
        return Status::invalid_argument;
    }
    const KmeansProblem& problem = problems[0];
    const int64_t positions = positions_of(problem, d);
    parallel_for(problem.rows, threads, [&](int64_t row) {
        for (int64_t p = 0; p < positions; ++p) {
            float x[kMaxSubvector];
            read_point(problem, row, p, d, x);
            const int64_t point = row * positions + p;
            const float* c = problem.codebook + static_cast<int64_t>(problem.codes[point]) * d;
            errors[point] = static_cast<float>(point_error(x, problem.h + p * d, c, d));
        }
    });
    return Status::ok;
} catch (...) {
    return failure();
}

Status kmeans_spread(const KmeansProblem* problems, int64_t count, int64_t entries, int d,
                     double scale, int64_t* spread, int threads) try {
    if (count != 1 || !valid_points(problems[0], d) || !valid_entries(entries) || threads < 1) {
        return Status::invalid_argument;
    }
    const KmeansProblem& problem = problems[0];
    // One table a share of the rows; integers, so the shares may follow the number of threads.
    const int64_t size = entries * d;
    const int64_t shares = std::min<int64_t>(threads, problem.rows);
    std::vector<int64_t> tables(static_cast<size_t>(shares * size), 0);
    parallel_for(shares, threads, [&](int64_t share) {
        int64_t* table = tables.data() + share * size;
        const int64_t end = (share + 1) * problem.rows / shares;
        for (int64_t row = share * problem.rows / shares; row < end; ++row) {
            add_row_spread(problem, row, d, scale, table);
        }
    });
    for (int64_t i = 0; i < size; ++i) {
        spread[i] = 0;
        for (int64_t share = 0; share < shares; ++share) {
            add_to(spread[i], tables[static_cast<size_t>(share * size + i)]);
        }
    }
    return Status::ok;
} catch (...) {
    return failure();
}

Status kmeans_merge_costs(const int64_t* sums, const float* codebook, int64_t entries, int d,
                          double scale, const int64_t* chosen, int64_t count, float* costs,
                          int threads) try {
    if (!valid_entries(entries) || d < 1 || d > kMaxSubvector || count < 0 || threads < 1) {
        return Status::invalid_argument;
    }
    std::vector<float> columns(static_cast<size_t>(entries * d));
    for (int64_t k = 0; k < entries; ++k) {
        for (int j = 0; j < d; ++j) {
            columns[static_cast<size_t>(j * entries + k)] = codebook[k * d + j];
        }
    }
    const auto merge = kmeans_table().merge;
    parallel_for(count, threads, [&](int64_t i) {
        const int64_t k = chosen[i];
        float weights[kMaxSubvector];
        for (int j = 0; j < d; ++j) {
            weights[j] =
                static_cast<float>(static_cast<double>(sums[k * (2 * d + 1) + d + j]) / scale);
        }
        const float* entry = codebook + k * d;
        costs[i] = std::min(merge(columns.data(), entries, 0, k, entry, weights, d),
                            merge(columns.data(), entries, k + 1, entries, entry, weights, d));
    });
    return Status::ok;
} catch (...) {
    return failure();
}

Status kmeans_energy(const KmeansProblem* problems, int64_t count, int d, double* energy,
                     int threads) try {
    if (count != 1 || !valid_points(problems[0], d) || threads < 1) return Status::invalid_argument;
    const KmeansProblem& problem = problems[0];
    std::vector<double> rows(static_cast<size_t>(problem.rows));
    parallel_for(problem.rows, threads,
                 [&](int64_t row) { rows[static_cast<size_t>(row)] = row_energy(problem, row); });
    TermSum sum;
    for (const double value : rows) sum.add(value);
    *energy = sum.total();
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
