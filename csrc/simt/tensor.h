// Tensor maps, and the bulk copies of boxes that they describe.
#pragma once

#include <cstdint>

namespace ck::simt {

// A tensor [size3, size2, size1, size0] of 16-bit numbers, of which boxes of 64 x box1 numbers of the dimensions 0 and
// 1 are copied.
struct TensorMap {
  const char* data;
  int64_t size[4];
  int64_t stride[3];  // in bytes, of dimensions 1 to 3
  int box1;
};

// nullptr, or what is wrong.
const char* make_tensor_map(TensorMap& map, const void* data, const int64_t (&size)[4], const int64_t (&stride)[3],
                            int box1);

// at: of the first number of the box, in dimensions 0 to 3. What lies outside of the tensor is 0. Rows of the box are
// 128 bytes, and the 16-byte piece p of row r comes to stand in place of piece p ^ (r % 8).
void tensor_load(void* to, const TensorMap& map, const int (&at)[4], void* mbarrier);

}  // namespace ck::simt
