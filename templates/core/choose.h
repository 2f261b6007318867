// Finding the kernel for a call, and the words for when there is none. No torch.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>

#include "copies.h"
#include "error.h"
#include "gnaforge/names.h"
#include "gnaforge/pattern.h"
#include "gnaforge/rules.h"
#include "signature.h"
#include "table.h"

namespace gnaforge {

/// What a lookup yields: kernels live as long as the process, so the pointer stays good.
struct Choice {
  const gnaforge_entry* entry;
  int64_t workspace_bytes;
  uint64_t copies;  ///< Inputs that it takes contiguous copies of, as bits of roles.
};

/// Calls that one kernel is to run: one, or those of a list.
struct CallSpan {
  const gnaforge_args* const* calls;
  int64_t count;
  const std::string* names;  ///< Of each, for errors; null of a single call.
};

/// An error that says why there is none; as `raise` takes it.
struct NoChoice {
  ErrorCode code;
  std::string text, advice;
};

inline std::string describe(const gnaforge_args& args) {
  const gnaforge_problem& p = *args.problem;
  const auto list = [&p](const int64_t* values) {
    std::string text;
    for (int d = 0; d < p.rank; ++d) text += (d ? "x" : "") + std::to_string(values[d]);
    return text;
  };
  std::string text = args.op == GNAFORGE_GNA_FORWARD ? "" : std::string(op_name(args.op)) + ", ";
  text += "rank " + std::to_string(p.rank) + ", " + dtype_name(tensor_of(args, GNAFORGE_Q)->dtype) + ", head_dim " +
          std::to_string(p.head_dim);
  if (p.value_head_dim != p.head_dim) text += " (value " + std::to_string(p.value_head_dim) + ")";
  text += ", heads " + std::to_string(p.heads);
  if (p.kv_heads != p.heads) text += " (kv " + std::to_string(p.kv_heads) + ")";
  text += ", tokens " + list(p.tokens) + ", window " + list(p.window) + ", stride " + list(p.stride) + ", dilation " +
          list(p.dilation) + ", causal " + list(p.causal);
  for (int feature = 0; feature < feature_count; ++feature)
    if (args.features >> feature & 1) text += std::string(", with ") + feature_names[feature];
  return text + (args.device == GNAFORGE_CUDA ? ", on cuda" : ", on cpu");
}

/// The Python call that registers a kernel for the problem; the runtime's Request.register_call says the same.
inline std::string register_call(const gnaforge_args& args) {
  const gnaforge_problem& p = *args.problem;
  const auto field = [&p](const char* name, auto text_of) {
    std::string text;
    for (int d = 0; d < p.rank; ++d) text += (d ? ", " : "") + std::string(text_of(d));
    return std::string(", ") + name + "=" + (p.rank == 1 ? text : "(" + text + ")");
  };
  const auto extents = [&field](const char* name, const int64_t* values) {
    return field(name, [values](int d) { return std::to_string(values[d]); });
  };
  const auto some_differ = [&p](const int64_t* values, int64_t neutral) {
    return std::any_of(values, values + p.rank, [neutral](int64_t value) { return value != neutral; });
  };
  const auto other_than = [&p](const int64_t* values, const int64_t* others) {
    return !std::equal(values, values + p.rank, others);
  };
  std::string text = "gnaforge.register(rank=" + std::to_string(p.rank) + ", head_dim=" + std::to_string(p.head_dim);
  if (p.value_head_dim != p.head_dim) text += ", value_head_dim=" + std::to_string(p.value_head_dim);
  const uint32_t dtype = tensor_of(args, GNAFORGE_Q)->dtype;
  text += std::string(", dtype=\"") + dtype_name(dtype) + "\"";
  if (const gnaforge_tensor* const out = tensor_of(args, GNAFORGE_OUT); dtype == GNAFORGE_E4M3 && out != nullptr)
    text += std::string(", out_dtype=\"") + dtype_name(out->dtype) + "\"";
  if (args.op != GNAFORGE_GNA_FORWARD) text += ", direction=\"backward\"";
  if (args.device == GNAFORGE_CPU) text += ", arch=\"cpu\"";
  text += extents("tokens", p.tokens) + extents("window", p.window);
  if (some_differ(p.stride, 1)) text += extents("stride", p.stride);
  if (some_differ(p.dilation, 1)) text += extents("dilation", p.dilation);
  static constexpr const char *kinds[] = {"False", "True", "\"block\""},
                              *edges[] = {"\"shift\"", "\"cut\"", "\"wrap\""};
  if (some_differ(p.causal, 0)) text += field("causal", [&p](int d) { return kinds[p.causal[d]]; });
  if (some_differ(p.edge, 0)) text += field("edge", [&p](int d) { return edges[p.edge[d]]; });
  if (some_differ(p.sink, 0)) text += extents("sink", p.sink);
  bool one_grid = !other_than(p.grid, p.kv_tokens);  // all that there is of it is where the keys and queries are
  for (int d = 0; d < p.rank; ++d) one_grid = one_grid && (p.tokens[d] == p.kv_tokens[d] || PatternAxis(p, d).dense());
  if (!one_grid) text += extents("grid", p.grid);
  if (some_differ(p.q_offset, 0)) text += extents("q_offset", p.q_offset);
  if (other_than(p.kv_tokens, p.tokens)) text += extents("kv_tokens", p.kv_tokens);
  if (some_differ(p.kv_offset, 0)) text += extents("kv_offset", p.kv_offset);
  if (some_differ(p.kv_sink, 0)) text += extents("kv_sink", p.kv_sink);
  std::string pieces;
  int count = 0;
  for (const int64_t tokens : p.extra_tokens)
    if (tokens > 0) pieces += (count++ ? ", " : "") + std::to_string(tokens);
  if (count > 0) text += ", extra_tokens=" + (count > 1 ? "(" + pieces + ")" : pieces);
  text += ", heads=" + std::to_string(p.heads);
  if (p.kv_heads != p.heads) text += ", kv_heads=" + std::to_string(p.kv_heads);
  if (p.batch != 1) text += ", batch=" + std::to_string(p.batch);
  return text + ")";
}

/// GNAFORGE_OK if the kernel computes the call; else `why` says why not. Another op's entry is never asked, nor one
/// without the features that the call needs: it may be older than they are.
inline int can_run(const Kernel& kernel, const gnaforge_args& args, std::string& why) {
  const auto refuse = [&why](gnaforge_code code, std::string text) {
    why = std::move(text);
    return static_cast<int>(code);
  };
  if (kernel.entry->op != args.op) return refuse(GNAFORGE_NO_OP, std::string("doesn't compute ") + op_name(args.op));
  if (const uint64_t missing = args.features & ~kernel.entry->features)
    return refuse(GNAFORGE_NO_FEATURE, std::string("doesn't have the feature ") + feature_name(missing));
  if (kernel.tensor_device() != args.device)
    return refuse(GNAFORGE_NO_DEVICE, args.device == GNAFORGE_CUDA ? "takes CPU tensors" : "takes CUDA tensors");
  char text[512] = "";
  const int code = kernel.entry->can_run(&args, text, sizeof(text));
  if (code != GNAFORGE_OK) why = text;
  return code;
}

/// GNAFORGE_OK if the kernel computes all calls; else as above of the first that it doesn't, which `why` names.
inline int can_run(const Kernel& kernel, const CallSpan& span, std::string& why) {
  for (int64_t i = 0; i < span.count; ++i)
    if (const int code = can_run(kernel, *span.calls[i], why)) {
      if (span.names) why.insert(0, span.names[i] + ": ");
      return code;
    }
  return GNAFORGE_OK;
}

inline double visited_work(const gnaforge_entry& entry, const CallSpan& span) {
  double work = 0;
  for (int64_t i = 0; i < span.count; ++i) work += entry.visited_work(span.calls[i]);
  return work;
}

/// The kernel named `key`, or for an empty key the one with the least work among those that can run all calls.
/// Emulated kernels run only when named. Null if there is none: `none` then lists each kernel's reason for refusing.
inline const gnaforge_entry* find(const Table& table, std::string_view key, const CallSpan& span, NoChoice& none) {
  const gnaforge_args& args = *span.calls[0];
  const auto describe_all = [&] {
    const std::string others = std::to_string(span.count - 1);
    return describe(args) + (span.count > 1 ? ", and " + others + " more of a list" : "");
  };
  const auto kernels = table.kernels();
  std::string why;
  if (!key.empty()) {
    const std::string name(key);
    const auto found = kernels->find(name);
    if (found == kernels->end()) {
      none = {ErrorCode::missing, "no kernel " + name + " is loaded or in the cache",
              "\nregister it with: gnaforge.register(\"" + name + "\")"};
      return nullptr;
    }
    const int code = can_run(found->second, span, why);
    if (code == GNAFORGE_OK) return found->second.entry;
    none = {code == GNAFORGE_NO_LAYOUT ? ErrorCode::layout : ErrorCode::refused,
            "no kernel fits: " + name + " was asked for and can't run this problem (" + describe_all() + "): " + why,
            ""};
    return nullptr;
  }
  const gnaforge_entry* best = nullptr;
  double least = 0;
  bool layout = false;
  std::string refusals;
  for (const auto& [name, kernel] : *kernels) {
    if (kernel.entry->op != args.op) continue;
    if (kernel.emulated) {
      why = "emulated, runs only when named";
    } else if (const int code = can_run(kernel, span, why)) {
      layout = layout || code == GNAFORGE_NO_LAYOUT;
    } else {
      const double work = visited_work(*kernel.entry, span);
      if (!best || work < least) {
        best = kernel.entry;
        least = work;
      }
      continue;
    }
    refusals += "\n  " + name + ": " + why;
  }
  if (!best)
    none = {
        layout ? ErrorCode::layout : ErrorCode::none_fits,
        "no kernel fits this problem: " + describe_all() + (refusals.empty() ? "\n  no kernel is loaded" : refusals),
        "\nregister one with: " + register_call(args)};
  return best;
}

/// A kernel as `find` gives it, for a valid call. Only where none takes tensors as they lie, one that does if inputs
/// are copied. Raises an error if there is none either.
inline Choice choose(const Table& table, std::string_view key, const gnaforge_args& args) {
  NoChoice none;
  const gnaforge_args* call = &args;
  if (const gnaforge_entry* const entry = find(table, key, {&call, 1, nullptr}, none))
    return {entry, entry->workspace_bytes(&args), 0};
  if (none.code == ErrorCode::layout) {
    CopiedInputs copied(args);
    NoChoice again;
    call = &copied.args();
    if (const gnaforge_entry* const entry = find(table, key, {&call, 1, nullptr}, again)) {
      char text[512];
      copied.leave_out(
          [&](const gnaforge_args& less) { return entry->can_run(&less, text, sizeof(text)) == GNAFORGE_OK; });
      return {entry, entry->workspace_bytes(&copied.args()), copied.roles()};
    }
  }
  raise(none.code, none.text, none.advice);
}

/// Raises an error unless the call keeps the rules that no kernel can lift.
inline void require_valid(const gnaforge_args& args) {
  char text[512] = "";
  if (const int code = rules::call(args, {text, sizeof(text)}))
    raise(code == GNAFORGE_BAD_INPUT ? ErrorCode::bad_input : ErrorCode::other, text);
}

/// `choose` with a memo per thread, so that a repeated call costs one comparison, and is checked once.
inline Choice choose_memoised(const Table& table, std::string_view key, const gnaforge_args& args) {
  struct Slot {
    Signature signature;
    std::string key;
    Choice choice;
  };
  constexpr size_t slots = 128;
  thread_local std::unique_ptr<Slot> memo[slots];
  const Signature signature(table.generation(), args);
  std::unique_ptr<Slot>& slot = memo[signature.hash() % slots];
  if (!slot || !(slot->signature == signature) || slot->key != key) {
    require_valid(args);
    slot.reset(new Slot{signature, std::string(key), choose(table, key, args)});
  }
  return slot->choice;
}

}  // namespace gnaforge
