// Masks of many boxes, of ranges that test_masks.py makes: on the host, and with nvcc as a kernel.
#include "gnaforge/gna/mask.h"

using namespace gnaforge;

namespace {

/// Finds one mask. `ranges` are begin and end, axis by axis; `bits` gets RowMask::words words.
template <class Tile>
GNAFORGE_HD void find(const int* ranges, unsigned* bits) {
  Interval range[Tile::rank];
  GNAFORGE_UNROLL
  for (int d = 0; d < Tile::rank; ++d) range[d] = {ranges[2 * d], ranges[2 * d + 1]};
  unsigned found[RowMask<Tile>::words];
  RowMask<Tile>::find(range, found);
  GNAFORGE_UNROLL
  for (int w = 0; w < RowMask<Tile>::words; ++w) bits[w] = found[w];
}

/// Finds the `number`th of many masks, of the `index`th box.
template <class... Tiles>
struct Boxes {
  GNAFORGE_HD static void find_one(int index, int number, const int* ranges, unsigned* bits) {
    int at = 0;
    ((at++ == index ? find<Tiles>(ranges + 2 * Tiles::rank * number, bits + RowMask<Tiles>::words * number) : void()),
     ...);
  }

#if !defined(__CUDACC__)
  static constexpr int count = sizeof...(Tiles);

  static int extent(int index, int axis) {
    int at = 0, found = 0;
    ((at++ == index && axis < Tiles::rank ? void(found = Tiles::extent(axis)) : void()), ...);
    return found;
  }
#endif
};

// Rows of keys that lie across words, that fill them and that are longer; slices of one word and of more; the same of
// axes of a single key.
using All = Boxes<Box<1>, Box<16>, Box<32>, Box<33>, Box<64>, Box<96>, Box<112>, Box<128>, Box<256>,  //
                  Box<1, 1>, Box<8, 14>, Box<4, 28>, Box<7, 16>, Box<16, 8>, Box<32, 4>, Box<2, 32>, Box<4, 32>,
                  Box<3, 40>, Box<2, 64>, Box<1, 112>, Box<112, 1>, Box<5, 3>, Box<37, 3>, Box<11, 11>, Box<4, 24>,
                  Box<3, 31>, Box<16, 16>,  //
                  Box<1, 1, 1>, Box<2, 8, 8>, Box<4, 4, 8>, Box<2, 4, 14>, Box<4, 7, 4>, Box<2, 2, 28>, Box<2, 5, 8>,
                  Box<3, 2, 20>, Box<3, 3, 9>, Box<6, 5, 3>, Box<4, 1, 24>, Box<1, 4, 33>, Box<2, 40, 1>, Box<3, 7, 6>,
                  Box<14, 2, 4>, Box<2, 1, 56>, Box<5, 5, 5>>;

}  // namespace

#if defined(__CUDACC__)
extern "C" __global__ void find_masks(const int* number_of_box, const int* count, const int* ranges, unsigned* bits) {
  const int number = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (number < *count) All::find_one(*number_of_box, number, ranges, bits);
}
#else
extern "C" {

int box_count() { return All::count; }
int extent_of(int index, int axis) { return All::extent(index, axis); }  ///< 0 beyond the box's axes.
void find_masks(int index, int count, const int* ranges, unsigned* bits) {
  for (int number = 0; number < count; ++number) All::find_one(index, number, ranges, bits);
}

}  // extern "C"
#endif
