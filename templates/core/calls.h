// Lists of calls: what one kernel runs for slices of an operator's tensors, be they heads with windows of their own, or
// samples that are packed one after the other. No torch.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "choose.h"
#include "copies.h"
#include "gnaforge/names.h"
#include "gnaforge/rules.h"
#include "signature.h"
#include "table.h"

namespace gnaforge {

/// One call of a list: its problem, and where its part of the whole tensors begins.
struct Slice {
  gnaforge_problem problem;
  bool
      packed;  ///< Its tokens, and the batch entries of a whole that is one, lie along the only token dim of the whole.
  int64_t token, kv_token;  ///< Where it begins there.
  int64_t head, kv_head;
  int64_t round = 0;  ///< So many slices before it have the same keys, at least: their gradients are sums over rounds.
  int64_t sample = 0, samples = 1;  ///< Its first row of extra keys, of so many that each batch entry has.
};

/// The slices of a call, and their names for errors: `head 3`, `sample 0`.
struct Slices {
  std::vector<Slice> all;
  std::vector<std::string> names;

  /// With rounds one after the other, as gradients of keys need them.
  Slices by_round() const {
    Slices sorted;
    for (int64_t round = 0; sorted.all.size() < all.size(); ++round)
      for (size_t i = 0; i < all.size(); ++i) {
        if (all[i].round != round) continue;
        sorted.all.push_back(all[i]);
        sorted.names.push_back(names[i]);
      }
    return sorted;
  }
};

/// Complete arguments of each slice, which point into the whole tensors of a call.
class CallList {
 public:
  CallList(const gnaforge_args& whole, const Slices& given)
      : roles_(whole.roles), host_(whole.host ? *whole.host : no_host) {
    const bool sums = roles_of(whole).results & bit(GNAFORGE_GRAD_K);  // slices may share keys
    const Slices slices = sums ? given.by_round() : given;
    names_ = slices.names;
    const size_t count = slices.all.size();
    for (uint32_t role = 0; role < roles_; ++role)
      if (whole.tensors[role]) used_.push_back(static_cast<int>(role));
    problems_.reserve(count);
    offsets_.reserve(count * used_.size());
    views_.reserve(count * used_.size());
    by_role_.assign(count * roles_, nullptr);
    for (const Slice& slice : slices.all) {
      const size_t i = problems_.size();
      problems_.push_back(slice.problem);
      for (const int role : used_) {
        by_role_[i * roles_ + static_cast<size_t>(role)] = views_.data() + views_.size();
        views_.push_back(view(whole, slice, role));
      }
      gnaforge_args args = whole;
      if (i > 0) args.flags &= ~GNAFORGE_ARGS_BESIDE;  // run one by one, calls share a workspace
      args.features = features_of(problems_[i]) | (whole.features & ~features_of(*whole.problem));
      args.tensors = by_role_.data() + i * roles_;
      args.problem = &problems_[i];
      args.host = whole.host ? &host_ : nullptr;
      if (sums && slice.round > 0) {
        if (slice.round > slices.all[i - 1].round) round_ends_.push_back(static_cast<int64_t>(i));
        args.accumulate |= roles_of(args).results & gradient_roles;
        args.features |= GNAFORGE_FEATURE_ACCUMULATE;
      }
      args_.push_back(args);
    }
    round_ends_.push_back(static_cast<int64_t>(count));
    for (const gnaforge_args& args : args_) pointers_.push_back(&args);
  }
  CallList(const CallList&) = delete;
  CallList& operator=(const CallList&) = delete;

  CallSpan calls() const { return {pointers_.data(), static_cast<int64_t>(pointers_.size()), names_.data()}; }

  /// Calls `use` of each round's calls, in order: none of them writes what another of its round does. Ends at the first
  /// that isn't 0, which it returns.
  template <class Use>
  int for_rounds(const Use& use) const {
    int64_t begin = 0;
    for (const int64_t end : round_ends_) {
      if (const int code = use(CallSpan{pointers_.data() + begin, end - begin, names_.data() + begin})) return code;
      begin = end;
    }
    return 0;
  }

  /// Points into the tensors of `whole`, which is as the constructor's, with other data.
  void place(const gnaforge_args& whole) {
    size_t next = 0;
    if (whole.host) host_ = *whole.host;
    for (size_t i = 0; i < args_.size(); ++i)
      for (const int role : used_) {
        views_[next].data = moved(whole.tensors[role]->data, offsets_[next]);
        ++next;
      }
  }

  /// Raises an error unless all calls keep the rules that no kernel can lift.
  void require_valid() const {
    char text[512] = "";
    for (size_t i = 0; i < args_.size(); ++i)
      if (const int code = rules::call(args_[i], {text, sizeof(text)}))
        raise(code == GNAFORGE_BAD_INPUT ? ErrorCode::bad_input : ErrorCode::other, names_[i] + ": " + text);
  }

 private:
  static constexpr gnaforge_host no_host{};

  /// Of a slice's part of a tensor. Keeps how far into the tensor it begins.
  gnaforge_tensor view(const gnaforge_args& whole, const Slice& slice, int role) {
    gnaforge_tensor part = *whole.tensors[role];
    const gnaforge_problem& p = slice.problem;
    const RoleFacts& facts = role_facts[role];
    int64_t offset = (facts.heads == Heads::key ? slice.kv_head : slice.head) * part.head_stride;  // 0 without heads
    if (is_of_piece(role)) {
      offset += slice.sample * part.batch_stride;
      if (whole.problem->batch > 1) part.batch_stride *= slice.samples;
    } else if (slice.packed) {
      const bool is_key = facts.tokens == Tokens::key;
      const int64_t* const extents = is_key ? p.kv_tokens : p.tokens;
      int64_t stride = part.token_stride[0];
      offset += (is_key ? slice.kv_token : slice.token) * stride;
      for (int d = p.rank; d-- > 0; stride *= extents[d]) part.token_stride[d] = stride;
      if (whole.problem->batch == 1) part.batch_stride = stride;
    }
    offsets_.push_back(offset * dtype_bytes(part.dtype));
    part.data = moved(part.data, offsets_.back());
    return part;
  }

  static bool is_of_piece(int role) {
    return role_facts[role].tokens == Tokens::extra || role == GNAFORGE_EXTRA_LENGTHS ||
           role == GNAFORGE_EXTRA_LENGTHS + 1;
  }

  /// Of calls that are only looked at there are no data, and the address counts alone.
  static void* moved(void* data, int64_t bytes) {
    return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes));
  }

  std::vector<std::string> names_;
  uint32_t roles_;
  gnaforge_host host_;
  std::vector<int> used_;  // roles that have a tensor
  std::vector<gnaforge_problem> problems_;
  std::vector<int64_t> offsets_;  // in bytes, of each call and role in use
  std::vector<gnaforge_tensor> views_;
  std::vector<const gnaforge_tensor*> by_role_;
  std::vector<gnaforge_args> args_;
  std::vector<const gnaforge_args*> pointers_;
  std::vector<int64_t> round_ends_;
};

/// What a lookup for a list yields; `together`: the kernel runs it as one.
struct ListChoice {
  const gnaforge_entry* entry;
  int64_t workspace_bytes;
  uint64_t copies;  ///< As in Choice, of the whole tensors.
  bool together;
};

inline ListChoice choose_of(const gnaforge_entry& entry, const CallList& list, uint64_t copies) {
  const bool together =
      list.calls().count > 1 && GNAFORGE_HAS(&entry, run_calls) && entry.run_calls && entry.calls_workspace_bytes;
  int64_t most = 0;
  list.for_rounds([&](const CallSpan& round) {
    if (together) most = std::max(most, entry.calls_workspace_bytes(round.calls, round.count));
    for (int64_t i = 0; i < round.count && !together; ++i) most = std::max(most, entry.workspace_bytes(round.calls[i]));
    return 0;
  });
  return {&entry, most, copies, together};
}

/// A list and the kernel for it.
struct Plan {
  std::unique_ptr<CallList> list;
  ListChoice choice;
};

/// One kernel for all slices of a call: as `choose` for one call, whose words it has.
inline Plan plan(const Table& table, std::string_view key, const gnaforge_args& whole, const Slices& slices) {
  auto list = std::make_unique<CallList>(whole, slices);
  list->require_valid();
  if (slices.all.empty()) return {std::move(list), {}};
  NoChoice none;
  if (const gnaforge_entry* const entry = find(table, key, list->calls(), none)) {
    const ListChoice choice = choose_of(*entry, *list, 0);
    return {std::move(list), choice};
  }
  if (none.code == ErrorCode::layout) {
    CopiedInputs copied(whole);
    list = std::make_unique<CallList>(copied.args(), slices);
    NoChoice again;
    if (const gnaforge_entry* const entry = find(table, key, list->calls(), again)) {
      copied.leave_out([&](const gnaforge_args& less) {
        const CallList lesser(less, slices);
        const CallSpan calls = lesser.calls();
        char text[512];
        return std::all_of(calls.calls, calls.calls + calls.count, [&](const gnaforge_args* call) {
          return entry->can_run(call, text, sizeof(text)) == GNAFORGE_OK;
        });
      });
      list = std::make_unique<CallList>(copied.args(), slices);
      const ListChoice choice = choose_of(*entry, *list, copied.roles());
      return {std::move(list), choice};
    }
  }
  raise(none.code, none.text, none.advice);
}

/// `plan` with a memo per thread. `numbers` and `kind` are what slices are made of, beside the whole call.
template <class MakeSlices>
std::shared_ptr<Plan> plan_memoised(const Table& table, std::string_view key, const gnaforge_args& whole, char kind,
                                    const std::vector<int64_t>& numbers, const MakeSlices& make_slices) {
  struct Slot {
    Signature signature;
    std::string key;
    char kind;
    std::vector<int64_t> numbers;
    std::shared_ptr<Plan> plan;
  };
  constexpr size_t slots = 64;
  thread_local std::unique_ptr<Slot> memo[slots];
  const Signature signature(table.generation(), whole);
  uint64_t hash = signature.hash();
  for (const int64_t number : numbers)
    hash = (hash ^ static_cast<uint64_t>(number)) * 0x9fb21c651e98df25u + (hash >> 29);
  std::unique_ptr<Slot>& slot = memo[(hash ^ hash >> 32) % slots];
  if (!slot || !(slot->signature == signature) || slot->key != key || slot->kind != kind || slot->numbers != numbers)
    slot.reset(new Slot{signature, std::string(key), kind, numbers,
                        std::make_shared<Plan>(plan(table, key, whole, make_slices()))});
  return slot->plan;
}

/// Runs a list, on `stream`. As gnaforge_entry.run.
inline int run_list(const Plan& plan, void* workspace, void* stream, char* error, size_t n) {
  const gnaforge_entry& entry = *plan.choice.entry;
  return plan.list->for_rounds([&](const CallSpan& round) {
    if (plan.choice.together) return entry.run_calls(round.calls, round.count, workspace, stream, error, n);
    for (int64_t i = 0; i < round.count; ++i)
      if (const int code = entry.run(round.calls[i], workspace, stream, error, n)) return code;
    return static_cast<int>(GNAFORGE_OK);
  });
}

}  // namespace gnaforge
