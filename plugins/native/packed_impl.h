// The kernels of packed weights, in vectors of TRIMTAB_WIDTH floats; TRIMTAB_VNNI: bytes are multiplied directly. Included by one
// source file per instruction set that can.
#include "packed_int4.h"
#include "packed_int8.h"

namespace trimtab {
namespace {

template <typename Form>
constexpr PackedKernels packed_kernels_of(decltype(PackedKernels::prepare_blocks) prepare_blocks) {
  return {{Form::block_bytes, Form::pack_up}, {Form::block_bytes, Form::pack_down}, Form::row_bytes, Form::prepare, prepare_blocks,
          Form::dot, Form::sum_by_block};
}

}  // namespace

const PackedKernels TRIMTAB_PACKED[2] = {packed_kernels_of<PackedInt8>(PackedInt8::prepare_blocks), packed_kernels_of<PackedInt4Rows>(nullptr)};

}  // namespace trimtab
