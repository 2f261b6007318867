// What a producer takes to know of a launch whose slices may be of several calls: see calls_params.h. Device only.
#pragma once

#include "gnaforge/gpu/calls_params.h"
#include "gnaforge/gpu/work.h"

namespace gnaforge::gpu {

/// A Q tile whose heads are counted among those of its slice's maps. It may have `Heads` of them, from `head` on.
template <class QTile, int Heads = 1>
struct CallsPlace : Place<QTile> {
  template <class Params>
  __device__ __forceinline__ CallsPlace(const Params& params, int index) : Place<QTile>(params, index) {
    this->head = this->head * Heads + params.slices[this->slice].first_head;
    this->kv_head += params.slices[this->slice].first_kv_head;
  }
};

}  // namespace gnaforge::gpu
