// Example 88's mainloop with our loads: boxes of tokens straight from heads-last tensors, KV tiles in the order of the
// tile source. It is a base class, of which the kernel sees what is not hidden here. Device only.
#pragma once

#include <collective/fmha_collective_tma_warpspecialized.hpp>

#include "gnaforge/gpu/copy.h"
#include "gnaforge/gpu/cutlass.h"
#include "gnaforge/sm90/cutlass/mask.h"

namespace gnaforge::sm90_cutlass {

template <class Config, class Element>
struct MainloopBase {
  using L = Layout<Config>;
  using Tile = cute::Shape<cute::Int<L::rows>, cute::Int<L::columns>, cute::Int<L::channels>>;
  using Stride = cute::tuple<int, cute::_1, cute::tuple<int, int>>;  // says only which dim is contiguous
  using Tag = cutlass::fmha::kernel::Tag;
  template <Tag What, class Value>
  using Option = cutlass::fmha::kernel::Option<What, Value>;
  using type = cutlass::fmha::collective::FmhaMainloopTmaWarpSpecialized<
      Element, float, float, Tile, Stride, Stride, Stride, Mask<Config>, Option<Tag::kIsPersistent, cute::true_type>,
      Option<Tag::kStagesKV, cute::Int<L::stages>>, Option<Tag::kNumMmaWarpGroups, cute::Int<halves>>>;
};

template <class Config, class Element>
struct Mainloop : MainloopBase<Config, Element>::type {
  using Base = typename MainloopBase<Config, Element>::type;
  using L = Layout<Config>;
  using Half = typename L::Half;
  using Source = TileSource<Config>;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = L::rank;
  using QTileFacts = gpu::QTileFacts<rank>;
  using KvTileFacts = gpu::KvTileFacts<rank>;

  // Hidden: the bytes of a stage are those of our boxes.
  static constexpr int kInnerLoadBytes = L::chunks * KvTile::volume * row_bytes;
  static constexpr int kOuterLoadBytes = L::chunks * Half::volume * row_bytes;
  struct Params {
    const gpu::Params<rank>* kernel;
  };
  using Arguments = Params;
  struct SharedStorage : Base::SharedStorage {
    Notes<Source> notes;
  };

  // Where boxes go: [stage][chunk of channels][row][channel of the chunk], swizzled. Counted in elements.
  template <class Where, class... Coordinates>
  static constexpr int at(Coordinates... coordinates) {
    return Where{}(coordinates...);
  }
  using Q = typename Base::SmemLayoutQ;
  using K = typename Base::SmemLayoutK;
  using V = typename Base::SmemLayoutV;
  static constexpr int row = L::chunk_channels, last = row * (L::chunks - 1);
  static_assert(at<Q>(1, 0, 0) == row && at<K>(1, 0, 0) == row && at<V>(0, 1, 0) == row, "rows");
  static_assert(at<Q>(0, last, 0) == last * half_rows, "Q's chunks");
  static_assert(at<K>(0, last, 0) == last * L::columns && at<V>(last, 0, 0) == last * L::columns, "chunks of K and V");
  static_assert(at<Q>(0, 0, 1) * L::Element::bytes == L::half_bytes, "Q's stages");
  static_assert(at<K>(0, 0, 1) * L::Element::bytes == L::stage_bytes, "K's stages");
  static_assert(at<V>(0, 0, 1) * L::Element::bytes == L::stage_bytes, "V's stages");
  static_assert(L::stages <= 5, "slots enough for the KV tiles that loads are ahead");

  static __device__ __forceinline__ void prefetch_tma_descriptors(const Params& params) {
    ptx::prefetch_map(&params.kernel->maps[0].q);
    ptx::prefetch_map(&params.kernel->maps[0].k);
    ptx::prefetch_map(&params.kernel->maps[0].v);
    ptx::prefetch_map(&params.kernel->maps[0].out);
  }

  /// Notes of a Q tile; `stages` counts Q's stages since launch, of which a tile takes two.
  static __device__ __forceinline__ typename Notes<Source>::QTile& note(SharedStorage& storage, int stages) {
    return storage.notes.q_tile[stages / halves % slots];
  }

  /// The warp that loads K and V. It has 24 registers a thread, in which there is no room for working out which: the
  /// warp that loads Q notes that one Q tile ahead, and what of it a copy needs is read anew each time.
  template <bool LoadQ, class Block, class Shape, class Barrier>
  __device__ __forceinline__ void load_kv_maybe_q(int, const Block&, const Params& given, const Shape&,
                                                  typename Base::MainloopPipeline& pipeline,
                                                  typename Base::PipelineState& state,
                                                  typename Base::MainloopPipelineQ&,
                                                  typename Base::PipelineStateQ& q_state, SharedStorage& storage,
                                                  Barrier& noted, bool) {
    static_assert(!LoadQ, "the kernel's option kLoadsQSeparately");
    const bool leader = cute::elect_one_sync();
    const gpu::Params<rank>& params = *given.kernel;
    noted.arrive();
    noted.wait(q_state.count() / halves % 2);
    __syncwarp();  // the compiler moves no access to the notes above it
    auto& notes = note(storage, q_state.count());
    q_state.advance(halves);
    const ptx::SharedAddress memory = ptx::shared_address(storage.smem_k.data());
    const ptx::SharedAddress q_facts = ptx::shared_address(notes.facts), more = ptx::shared_address(notes.more);
    const ptx::SharedAddress all_kv_facts = ptx::shared_address(storage.notes.kv_facts);
    const auto load = [&](bool values) {
      const ptx::SharedAddress kv_facts = all_kv_facts + gpu::kv_facts_bytes * (state.count() / 2 % slots);
      pipeline.producer_acquire(state);
      if (leader) {
        const QTileFacts work = QTileFacts::load(q_facts);
        const gpu::Maps& maps = params.maps[work.slice];
        gpu::load_box<L, L::chunks>(
            values ? maps.v : maps.k, params.folded, ptx::shared_address(pipeline.producer_get_barrier(state)),
            memory + state.index() * L::stage_bytes, L::columns * row_bytes, values ? L::value_head_dim : L::head_dim,
            ptx::load_shared(more).x, KvTileFacts::load(kv_facts).origin, work.batch);
      }
      ++state;
    };
    const int count = QTileFacts::load(q_facts).count;
#pragma unroll 1
    for (int index = 0; index < count; ++index) {
      if (leader) {
        if (index == 0)
          notes.walk.begin(notes.list);
        else
          notes.walk.step(notes.list, index);
        int origin[rank];
#pragma unroll
        for (int d = 0; d < rank; ++d) origin[d] = Source::origin(notes.list, notes.walk, d);
        const TileKind kind = Source::kind(notes.list, index);
        gpu::count_tile(kind != TileKind::interior);
        // Before the arrival that acquires K's stage, which publishes it.
        KvTileFacts::store(all_kv_facts + gpu::kv_facts_bytes * (state.count() / 2 % slots), origin, kind);
      }
      load(false);
      load(true);
    }
  }

  /// The warp that loads Q.
  template <class Block, class Shape, class Barrier>
  __device__ __forceinline__ void load_maybe_q(const Block& block, const Params& given, const Shape&,
                                               typename Base::MainloopPipelineQ& pipeline,
                                               typename Base::PipelineStateQ& state, SharedStorage& storage,
                                               Barrier& noted, bool) {
    const bool leader = cute::elect_one_sync();
    const gpu::Params<rank>& params = *given.kernel;
    // By all lanes: for one alone, ptxas keeps less of it in registers that all share.
    gpu::Work<Source> work(params, cute::get<0>(block));
    if (leader) {
      auto& notes = note(storage, state.count());
      QTileFacts::store(ptx::shared_address(notes.facts), work, work.list.count, work.list.interior);
      ptx::store_shared(ptx::shared_address(notes.more), work.kv_head, work.list.interior, 0, 0);
      notes.list = work.list;
    }
    __syncwarp();
    noted.arrive();
    const ptx::SharedAddress memory = ptx::shared_address(storage.smem_q.data());
#pragma unroll
    for (int half = 0; half < halves; ++half) {
      pipeline.producer_acquire(state);
      if (leader)
        gpu::load_box<L, L::chunks>(params.maps[work.slice].q, params.folded,
                                    ptx::shared_address(pipeline.producer_get_barrier(state)),
                                    memory + state.index() * L::half_bytes, half_rows * row_bytes, L::head_dim,
                                    work.head, work.q_begin, work.batch);
      work.q_begin[Half::axis] += Half::offset;
      ++state;
    }
  }

  /// A third warp, which has nothing to do in a forward pass.
  template <class... Arguments>
  __device__ __forceinline__ void reduce(const Arguments&...) {}

  /// A warpgroup that computes. The third of the results is where the facts of the Q tile are.
  template <class Block, class Shape, class Reducer, class ReducerState, class Order>
  __device__ __forceinline__ auto compute(const Block&, const Block&, const Params& given, const Shape&,
                                          typename Base::MainloopPipeline& pipeline,
                                          typename Base::PipelineState& state,
                                          typename Base::MainloopPipelineQ& q_pipeline,
                                          typename Base::PipelineStateQ& q_state, Reducer& reducer,
                                          ReducerState& reducer_state, SharedStorage& storage, Order& order) {
    q_pipeline.consumer_wait(q_state);  // with Q come the facts
    auto& notes = note(storage, q_state.count());
    const ptx::SharedAddress q_facts = ptx::shared_address(notes.facts);
    Problem<Config> problem;
    problem.params = given.kernel;
    problem.kv_facts = ptx::shared_address(storage.notes.kv_facts);
    problem.mask_table = ptx::shared_address(storage.notes.mask_table);
    problem.first = state.count() / 2;
    problem.interior = ptx::load_shared(ptx::shared_address(notes.more)).y;
    {
      QTileFacts facts = QTileFacts::load(q_facts);
      facts.q_begin[Half::axis] += Half::begin(q_state.count() % halves, Half::axis);
      problem.count = facts.count;
      if (facts.masked()) problem.windows.compute(*given.kernel, facts, first_row());
    }
    typename Base::Params own;  // of which the computing part reads the scales
    own.scale_softmax = given.kernel->scale;
    own.scale_softmax_log2 = given.kernel->scale_log2;
    own.rp_dropout = 1.0f;
    const auto nowhere = cute::make_coord(0, cute::_0{});
    const auto result = Base::compute(nowhere, nowhere, own, problem, pipeline, state, q_pipeline, q_state, reducer,
                                      reducer_state, storage, order);
    return cute::make_tuple(cute::get<0>(result), cute::get<1>(result), q_facts);
  }

  /// The warp's, within its half.
  static __device__ __forceinline__ int first_row() { return ptx::reload_thread_index() % warpgroup_threads / 32 * 16; }
};

}  // namespace gnaforge::sm90_cutlass
