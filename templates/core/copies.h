// Calls whose kernel can't read some inputs as they lie: which of them must be copied is the kernel's to say. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "gnaforge/names.h"
#include "gnaforge/rules.h"

namespace gnaforge {

/// The view of a contiguous tensor of `role`; the alignment of torch's memory suits every kernel.
inline gnaforge_tensor contiguous_view(const gnaforge_problem& problem, int role, uint32_t dtype) {
  const Sizes sizes = sizes_of(problem, role);
  gnaforge_tensor view{};
  view.struct_size = sizeof(view);
  view.dtype = dtype;
  // Of dims without elements strides are as if they had one, as torch's are. Those of a call that is only looked at may
  // be beyond 64 bits: the rules refuse it.
  int64_t stride = std::max<int64_t>(sizes.channels, 1);
  const auto next = [&stride](int64_t size) {
    const int64_t own = stride;
    if (__builtin_mul_overflow(stride, std::max<int64_t>(size, 1), &stride)) stride = INT64_MAX;
    return own;
  };
  const int64_t head_stride = next(sizes.heads);
  if (role_facts[role].heads != Heads::none) view.head_stride = head_stride;
  for (int d = token_dims(problem, role); d-- > 0;) view.token_stride[d] = next(sizes.tokens[d]);
  view.batch_stride = stride;
  return view;
}

/// The arguments of a call with its inputs, or some of them, as contiguous copies would be.
class CopiedInputs {
 public:
  explicit CopiedInputs(const gnaforge_args& args) : original_(args), args_(args) {
    std::copy(args.tensors, args.tensors + args.roles, std::begin(tensors_));
    args_.tensors = tensors_;
    const uint64_t results = roles_of(args).results;
    for (int role = 0; role < roles_end(args); ++role) {
      if (!args.tensors[role] || (results & bit(role))) continue;
      views_[role] = contiguous_view(*args.problem, role, args.tensors[role]->dtype);
      tensors_[role] = &views_[role];
      roles_ |= bit(role);
    }
  }
  CopiedInputs(const CopiedInputs&) = delete;
  CopiedInputs& operator=(const CopiedInputs&) = delete;

  const gnaforge_args& args() const { return args_; }

  /// Which inputs are copies, as bits of roles.
  uint64_t roles() const { return roles_; }

  /// Leaves out every copy without which `suffices` still says yes of the arguments.
  template <class Suffices>
  void leave_out(Suffices suffices) {
    for (int role = 0; role < roles_end(args_); ++role) {
      if (!(roles_ & bit(role))) continue;
      tensors_[role] = original_.tensors[role];
      if (suffices(args_))
        roles_ &= ~bit(role);
      else
        tensors_[role] = &views_[role];
    }
  }

 private:
  const gnaforge_args& original_;
  gnaforge_args args_;
  gnaforge_tensor views_[GNAFORGE_ROLES];
  const gnaforge_tensor* tensors_[GNAFORGE_ROLES] = {};
  uint64_t roles_ = 0;
};

}  // namespace gnaforge
