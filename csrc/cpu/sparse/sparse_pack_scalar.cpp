#include "cpu/sparse/sparse_pack_scalar.h"

#include "cpu/base/convert_row.h"
#include "cpu/sparse/sparse_pack_table.h"

namespace nowag::cpu {
namespace {

template <typename Element>
void gather(const Element* row, const uint8_t* bits, int64_t cols, Element* values) {
    gather_from(0, row, bits, cols, values);
}

template <typename Element>
void expand(const Element* values, const uint8_t* bits, int64_t cols, Element* row) {
    expand_from(0, values, bits, cols, row);
}

}  // namespace

const SparsePackTable kSparsePackScalar = {gather<uint16_t>, gather<uint32_t>, expand<uint16_t>,
                                           expand<uint32_t>, convert_row};

}  // namespace nowag::cpu
