// The warpgroups that turn scores in tensor memory into probabilities: a thread has one row. Device only.
#pragma once

#include "gnaforge/gna/mask.h"
#include "gnaforge/ptx/hold.h"
#include "gnaforge/ptx/marker.h"
#include "gnaforge/ptx/tcgen05.h"
#include "gnaforge/sm100/forward/facts.h"
#include "gnaforge/sm100/forward/row_softmax.h"

namespace gnaforge::sm100 {

/// What the thread's row sees.
template <class Config>
struct RowWindow {
  using L = Layout<Config>;
  using Source = TileSource<Config>;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = L::rank;

  Interval keys[rank];  ///< Rows of the key tensor.

  /// Rows of tokens that don't exist get the last one's window; nobody stores them.
  __device__ __forceinline__ void compute(const Params<Config>& params, const gpu::QTileFacts<rank>& work, int half) {
    const int row = threadIdx.x % half_rows;
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      const int query = work.q_begin[d] + L::Half::begin(half, d) + L::token(row, d);
      const Band band = params.template pattern<Band>(work.slice, d);
      const Interval seen = Source::row(band, min_int(query, params.queries(work.slice, d) - 1));
      const int first = params.group(work.slice, d).kv_begin;
      keys[d] = {seen.begin - first, seen.end - first};
    }
  }

  /// Of a KV tile's columns those that the row sees, one bit each. The Q tile's facts are in `slot`.
  __device__ __forceinline__ void find(unsigned (&bits)[L::words], const Params<Config>& params,
                                       const gpu::KvTileFacts<rank>& facts, ptx::SharedAddress slot) const {
    if (facts.kind == TileKind::part) {
#pragma unroll
      for (int w = 0; w < L::words; ++w) bits[w] = ~bits_from(facts.origin[0] - 32 * w);
      return;
    }
    Interval seen[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d) seen[d] = {keys[d].begin - facts.origin[d], keys[d].end - facts.origin[d]};
    if (facts.kind == TileKind::shell_below) {
      const int slice = gpu::QTileFacts<rank>::load_slice(slot);
#pragma unroll
      for (int d = 0; d < rank; ++d)
        seen[d] = Source::seen(params.template pattern<Band>(slice, d), keys[d], facts.origin[d]);
    }
    RowMask<KvTile>::find(seen, bits);
  }
};

/// What the exponentials of a row take.
struct Exponent {
  ptx::Pair scale, minus_base;
  float minus;

  __device__ __forceinline__ void set(float value) {
    minus = value;
    minus_base = ptx::make_pair(value);
  }
};

template <class Config>
struct Softmax {
  using L = Layout<Config>;
  using Row = RowSoftmax<typename L::Factors>;
  static constexpr int rank = L::rank;
  static constexpr int p_words = 32 * L::Element::bytes / 4;  ///< Columns of tensor memory for 32 probabilities.

  const Params<Config>& params;
  ptx::SharedAddress shared;
  ptx::TensorAddress lanes;  ///< Of the warp.
  int half;

  template <int N>
  static __device__ __forceinline__ void load_scores(float (&scores)[N], ptx::TensorAddress from) {
#pragma unroll
    for (int w = 0; w < N / 32; ++w) ptx::load_tensor_32(from + 32 * w, scores + 32 * w);
    constexpr int whole = N / 32 * 32;
    if constexpr (whole < N) ptx::load_tensor_16(from + whole, scores + whole);
    ptx::wait_tensor_loads();
    ptx::hold(scores);
  }

  /// Multiplies the output so far; few tiles do. The wait for probabilities, which come after, is one for this as well.
  static __device__ __forceinline__ void rescale(ptx::TensorAddress out, float factor) {
#pragma unroll 1
    for (int c = 0; c < L::out_channels; c += 16) {
      float own[16];
      ptx::load_tensor_16(out + c, own);
      ptx::wait_tensor_loads();
      ptx::hold(own);
      std::uint32_t bits[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) bits[i] = __float_as_uint(own[i] * factor);
      ptx::store_tensor_16(out + c, bits);
    }
  }

  /// Exponentials of the columns [Begin, End), in the place of scores, and rounded to `p`.
  template <int Begin, int End, int N>
  static __device__ __forceinline__ void compute_columns(float (&scores)[N], Exponent& exponent,
                                                         std::uint32_t (&p)[p_words]) {
    constexpr int pairs = (End - Begin) / 2;
    constexpr int by_fma = L::pairs_by_fma;
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      float &a = scores[Begin + 2 * i], &b = scores[Begin + 2 * i + 1];
      const ptx::Pair x = ptx::multiply_add(ptx::make_pair(a, b), exponent.scale, exponent.minus_base);
      if (Begin + 2 * i < L::columns_by_fma(N) && i * by_fma % 16 + by_fma >= 16) {  // evenly among the others
        exp2_by_fma(x, a, b);
      } else {
        ptx::split_pair(x, a, b);
        a = ptx::exp2_fast(a);
        b = ptx::exp2_fast(b);
      }
      if constexpr (L::Element::bytes == 2)
        p[i] = L::Element::pack(a, b);
      else if (i % 2 == 1)
        p[i / 2] = L::Element::pack(scores[Begin + 2 * i - 2], scores[Begin + 2 * i - 1], a, b);
    }
    // A product of bytes adds up 32 columns: those of no key are zero.
    if constexpr (L::Element::bytes == 1)
#pragma unroll
      for (int i = pairs / 2; i < p_words; ++i) p[i] = 0;
    // What follows takes an exponential of these: else ptxas computes all arguments before the first exponential.
    if constexpr (End < N && End != L::first_columns(N)) exponent.set(fmaf(scores[Begin], 0.0f, exponent.minus));
  }

  /// Waits until the products with the tile before the `number`th of the thread block are done, if there is one.
  __device__ __forceinline__ void await_products(std::uint32_t number) const {
    ptx::mbarrier_wait(shared + L::out_done + (L::p_apart ? 8 * half : 0), (number - 1) % 2);
    ptx::fence_tensor_after();
  }

  /// Columns from Begin on; stores them, and tells of the first ones and of the last.
  template <int Begin, int N>
  __device__ __forceinline__ void compute_words(float (&scores)[N], ptx::TensorAddress to, Exponent& exponent,
                                                int buffer) const {
    if constexpr (Begin < N) {
      constexpr int first = L::first_columns(N), End = min_int(Begin + 32, Begin < first ? first : N);
      constexpr bool ends_first = End == first, ends = End == N;
      std::uint32_t p[p_words];
      compute_columns<Begin, End>(scores, exponent, p);
      const ptx::TensorAddress at = to + Begin * L::Element::bytes / 4;
      if constexpr (p_words == 16 && End - Begin == 32)
        ptx::store_tensor_16(at, p);
      else
        ptx::store_tensor_8(at, p);
      if constexpr (ends_first || ends) {
        ptx::wait_tensor_stores();
        ptx::fence_tensor_before();
        __syncwarp();
        // The products with one word of several wait for p_first alone: p_last of all warps has come by then.
        if constexpr (ends_first && ends && L::words > 1) release(shared + L::p_last + 8 * buffer);
        release(shared + (ends_first ? L::p_first : L::p_last) + 8 * buffer);
      }
      // The exponentials that follow take a load that follows: else ptxas computes them before it stores.
      if constexpr (ends_first && !ends)
        exponent.set(exponent.minus + __uint_as_float(ptx::reload_shared_word(shared + L::zero)));
      compute_words<End>(scores, to, exponent, buffer);
    }
  }

  template <int N>
  static __device__ __forceinline__ void mask(float (&scores)[N], const unsigned (&bits)[L::words]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!(bits[i / 32] >> i % 32 & 1)) scores[i] = -INFINITY;
  }

  /// Which columns the row sees of the `number`th KV tile of the thread block, if not all, before its scores are there:
  /// nothing waits for it.
  __device__ __forceinline__ bool find_mask(unsigned (&bits)[L::words], const RowWindow<Config>& window,
                                            ptx::SharedAddress slot, std::uint32_t number) const {
    const gpu::KvTileFacts<rank> facts = await_kv_facts<Config>(shared, number);
    if (facts.kind == TileKind::interior) return false;  // as whole tiles of extra keys are
    ptx::mark<ptx::Marker::tile_is_shell>();
    window.find(bits, params, facts, slot);
    ptx::hold(bits);
    return true;
  }

  /// The tile's first N columns, if it is the `j`th of its Q tile. `scale` is of the scores, in powers of two.
  template <int N>
  __device__ __forceinline__ void tile(Row& row, bool masked, const unsigned (&bits)[L::words], std::uint32_t number,
                                       int j, float scale) const {
    const int buffer = L::pair ? half : number % 2;
    const ptx::TensorAddress at = L::scores(buffer) + lanes, out = L::out(half) + lanes;
    ptx::mbarrier_wait(shared + L::scores_full + 8 * buffer, (L::pair ? number : number / 2) % 2);
    ptx::fence_tensor_after();
    float scores[N];
    load_scores(scores, at);
    if constexpr (L::p_apart) {  // the next ones may take their place
      ptx::fence_tensor_before();
      __syncwarp();
      release(shared + L::scores_read + 8 * buffer);
    }
    if (masked) mask(scores, bits);
    const float top = Row::largest(scores);
    float base = row.shift;
    if (__any_sync(~0u, row.moves(top))) {
      const float factor = row.move(top, base, scores, scale);
      if (j > 0 && __any_sync(~0u, factor != 1.0f)) {
        if constexpr (!L::pair || L::p_apart) await_products(number);  // else scores tell that they are done
        rescale(out, factor);
      }
    }
    if constexpr (L::p_apart) await_products(number);  // they read the probabilities before
    Exponent exponent{ptx::make_pair(scale), 0, 0};
    exponent.set(Row::exponent(base));
    compute_words<0>(scores, L::p(buffer) + lanes, exponent, buffer);
    row.add(scores);  // while the product runs
  }

  /// KV tiles from the `j`th to `end`, of which the first `interior` need no mask.
  __device__ __forceinline__ void tiles(Row& row, const RowWindow<Config>& window, ptx::SharedAddress slot,
                                        std::uint32_t& number, int& j, int end, int interior, float scale) const {
#pragma unroll 1
    for (; j < end; ++j, ++number) {
      ptx::mark<ptx::Marker::tile_begins>();
      unsigned bits[L::words];
      const bool masked = j >= interior && find_mask(bits, window, slot, number);
      tile<L::columns>(row, masked, bits, number, j, scale);
    }
  }

  /// Those of which fewer columns are computed.
  __device__ __forceinline__ void short_tiles(Row& row, const RowWindow<Config>& window, ptx::SharedAddress slot,
                                              std::uint32_t& number, int& j, float scale) const {
    const ShortFacts facts = ShortFacts::of(slot);
#pragma unroll 1
    for (; j < facts.end; ++j, ++number) {
      ptx::mark<ptx::Marker::tile_begins>();
      unsigned bits[L::words];
      find_mask(bits, window, slot, number);
      short_tile<L::Short::below(L::columns)>(facts.columns, row, bits, number, j, scale);
    }
  }

  /// Of `columns`, N at most.
  template <int N>
  __device__ __forceinline__ void short_tile(int columns, Row& row, const unsigned (&bits)[L::words],
                                             std::uint32_t number, int j, float scale) const {
    constexpr int fewer = L::Short::below(N);
    if constexpr (fewer > 0)
      if (columns <= fewer) {
        short_tile<fewer>(columns, row, bits, number, j, scale);
        return;
      }
    tile<N>(row, true, bits, number, j, scale);
  }

  __device__ __forceinline__ void run() const {
    QTiles<Config> q_tiles{shared};
    std::uint32_t number = 0, parity = 0;
    for (;;) {
      const ptx::SharedAddress slot = q_tiles.next();
      RowWindow<Config> window;
      int count, interior;
      float scale = params.scale_log2;
      {
        const gpu::QTileFacts<rank> work = gpu::QTileFacts<rank>::load(slot);
        count = work.count;
        interior = work.interior;
        if (count == 0) return;
#pragma unroll
        for (int d = 0; d < rank; ++d) window.keys[d] = {0, 0};
        if (interior < count) window.compute(params, work, half);
        if constexpr (L::Factors::scaled)
          scale *= gpu::RowDescales<L::heads>(params, work, L::head(threadIdx.x % half_rows)).scores;
      }
      Row row;
      int j = 0;
      if constexpr (L::Short::any) {
        // Behind short tiles come those of extra keys, in the loop of the first ones.
        for (int end = ShortFacts::of(slot).begin;; end = count) {
          tiles(row, window, slot, number, j, end, interior, scale);
          if (j == count) break;
          short_tiles(row, window, slot, number, j, scale);
        }
      } else {
        tiles(row, window, slot, number, j, count, interior, scale);
      }
      ptx::mark<ptx::Marker::tile_ends>();
      const int place = (parity * 2 + half) * half_rows + threadIdx.x % half_rows;
      ptx::store_shared_words(shared + L::statistics + place * L::statistics_bytes, __float_as_uint(row.shift),
                              __float_as_uint(Row::true_sum(row.sum)));
      __syncwarp();
      release(shared + L::statistics_full + 8 * (parity * 2 + half));
      parity ^= 1;
    }
  }
};

}  // namespace gnaforge::sm100
