// Turns a call into launches of a kernel that takes gpu::Params. Host only.
#pragma once

#include <cstdint>

#include "gnaforge/gpu/launch.h"

namespace gnaforge::gpu {

/// `Config` and `L` are as in host.h.
template <class Config, class L>
class Launches {
  using Call = SlicedCall<Config, L>;
  static constexpr int rank = L::rank;

 public:
  static constexpr bool takes_lists = false;  ///< Calls that may share launches.

  Launches(const Target& target, bool, const Reason& reason) : target_(target), reason_(reason) {}

  /// A call that has something to compute.
  gnaforge_code add(const gnaforge_args& args) {
    const Call call(args);
    params_ = {};
    params_.folded = call.folded;
    params_.scale = static_cast<float>(args.problem->scale);
    params_.scale_log2 = static_cast<float>(args.problem->scale * 1.4426950408889634);
    params_.has_sides = call.has_sides();
    call.fill_common(params_);
    return call.for_each_slice([&](const auto& slice) { return add_slice(call, slice); });
  }

  /// Launches what has not been launched yet.
  gnaforge_code finish() { return slices_ == 0 ? GNAFORGE_OK : flush(); }

 private:
  gnaforge_code add_slice(const Call& call, const Slice<rank>& slice) {
    GroupParams group[rank];
    for (int d = 0; d < rank; ++d) group[d] = call.group_params(slice, d);
    if (!place(group)) {
      if (const gnaforge_code code = flush()) return code;
      place(group);  // in an empty launch
    }
    params_.log_sum_exp[slices_] = call.log_sum_exp(slice);
    auto* const maps = reinterpret_cast<CUtensorMap*>(&params_.maps[slices_]);
    const auto every = [](int) { return true; };
    if (const gnaforge_code code =
            encode_maps<typename Call::Element>(target_.encode, maps, call.shapes_of(slice), every, reason_))
      return code;
    const int end = params_.first_tile[slices_] + static_cast<int>(call.q_tiles(slice, group));
    for (int next = ++slices_; next <= max_slices; ++next) params_.first_tile[next] = end;
    return GNAFORGE_OK;
  }

  /// Whether there is room for a slice of these groups; it counts once `slices_` does.
  bool place(const GroupParams (&group)[rank]) {
    if (slices_ == max_slices) return false;
    int numbers = 0;
    for (int d = 0; d < rank; ++d) {
      const int number = number_of(group[d]);
      if (number == max_groups) return false;
      numbers |= number << (8 * d);
    }
    params_.groups_of[slices_] = numbers;
    return true;
  }

  /// The number of a group among those of the launch, which learns of it; max_groups if there is no room.
  int number_of(const GroupParams& group) {
    for (int i = 0; i < groups_; ++i)
      if (params_.groups[i] == group) return i;
    if (groups_ == max_groups) return max_groups;
    params_.groups[groups_] = group;
    return groups_++;
  }

  gnaforge_code flush() {
    slices_ = groups_ = 0;
    return launch<Config, L>(target_, params_, reason_);
  }

  Target target_;
  Reason reason_;
  Params<rank> params_{};
  int slices_ = 0, groups_ = 0;
};

}  // namespace gnaforge::gpu
