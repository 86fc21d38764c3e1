// The row loops of sparse_pack_table.h in plain C++, from column `begin` on: for the scalar table
// and for the tails of the vector ones. `static`: each instruction set compiles its own copy.
#pragma once

#include <cstdint>

namespace nowag::cpu {

static inline bool kept(const uint8_t* bits, int64_t j) { return (bits[j / 8] >> (j % 8)) & 1u; }

template <typename Element>
static inline void gather_from(int64_t begin, const Element* row, const uint8_t* bits, int64_t cols,
                               Element* values) {
    for (int64_t j = begin; j < cols; ++j) {
        if (kept(bits, j)) *values++ = row[j];
    }
}

template <typename Element>
static inline void expand_from(int64_t begin, const Element* values, const uint8_t* bits,
                               int64_t cols, Element* row) {
    for (int64_t j = begin; j < cols; ++j) row[j] = kept(bits, j) ? *values++ : Element{0};
}

}  // namespace nowag::cpu
