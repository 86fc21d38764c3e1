#include "nowag/vq_gemv.h"

#include <memory>
#include <vector>

#include "cpu/base/failure.h"
#include "cpu/base/parallel.h"
#include "cpu/vq/vq_gemv_product.h"

namespace nowag::cpu {
namespace {

// Fewer codes than this are done sooner than a second thread starts.
constexpr int64_t kCodesForThreads = 32768;
using Products = std::vector<std::unique_ptr<VqProduct>>;

bool is_valid(const VqProblem& problem) {
    return problem.tokens >= 1 && problem.tokens <= kVqGemvMaxTokens && problem.rows >= 1 &&
           problem.cols >= 1 && valid_vq(problem.d, problem.code_bits);
}

std::unique_ptr<VqProduct> product_of(const VqProblem& problem, int threads) {
    if (auto product = vq_look_up(problem, threads)) return product;
    if (auto product = vq_look_up_nibbles(problem, threads)) return product;
    return vq_decode(problem);
}

// One region of threads for all products: body(product, index) for every index below its count.
template <class Count, class Body>
void for_each(const Products& products, int threads, const Count& count, const Body& body) {
    int64_t total = 0;
    for (const auto& product : products) total += count(*product);
    parallel_for(total, threads, [&](int64_t index) {
        for (const auto& product : products) {
            const int64_t own = count(*product);
            if (index < own) return body(*product, index);
            index -= own;
        }
    });
}

void multiply(const std::vector<VqProblem>& problems, int threads) {
    int64_t codes = 0, inputs = 0;  // a code's position, for each token
    for (const VqProblem& problem : problems) {
        codes += problem.codes();
        inputs += problem.tokens * problem.positions();
    }
    if (codes < kCodesForThreads) threads = 1;
    Products products;
    for (const VqProblem& problem : problems) products.push_back(product_of(problem, threads));
    for_each(
        products, inputs <= kPositionsForThreads ? 1 : threads,
        [](const VqProduct& product) { return product.preparations(); },
        [](VqProduct& product, int64_t index) { product.prepare(index); });
    for_each(
        products, threads, [](const VqProduct& product) { return product.parts(); },
        [](VqProduct& product, int64_t part) { product.multiply(part); });
    for (const auto& product : products) product->finish();
}

}  // namespace

Status vq_gemv(const void* x, DType dtype, int64_t tokens, const uint8_t* packed,
               const uint16_t* codebook, const uint16_t* row_norms, const uint16_t* col_norms,
               const void* bias, int64_t rows, int64_t cols, int d, int code_bits, void* y,
               int threads) try {
    const VqProblem problem{x,         dtype, tokens, cols, packed,    codebook, row_norms,
                            col_norms, bias,  rows,   d,    code_bits, y};
    if (!is_valid(problem) || threads < 1) return Status::invalid_argument;
    multiply({problem}, threads);
    return Status::ok;
} catch (...) {
    return failure();
}

Status vq_gemv_group(const void* x, DType dtype, int64_t tokens, int64_t cols,
                     const int64_t* members, int64_t count, int threads) try {
    if (count < 1 || count > kVqMaxMembers || threads < 1) return Status::invalid_argument;
    std::vector<VqProblem> problems;
    for (int64_t m = 0; m < count; ++m) {
        const VqMember member = vq_member(members, m);
        problems.push_back({x, dtype, tokens, cols, member.packed, member.codebook,
                            member.row_norms, member.col_norms, member.bias, member.rows, member.d,
                            member.code_bits, member.y});
        if (!is_valid(problems.back())) return Status::invalid_argument;
    }
    multiply(problems, threads);
    return Status::ok;
} catch (...) {
    return failure();
}

}  // namespace nowag::cpu
