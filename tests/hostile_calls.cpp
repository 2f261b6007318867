// Calls of a kernel that break the contract, or are as large as numbers can be, each in a child process: prints for
// each its name, can_run's code, and run's if can_run accepts the call and its tensors are as large as it says.
// Compiled with sanitizers, so that a child whose call reads or writes out of bounds, or overflows, dies.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "gnaforge/abi.h"

// Of a kernel that takes another type, or whose `run` needs a GPU.
#ifndef HOSTILE_DTYPE
#define HOSTILE_DTYPE GNAFORGE_FP32
#endif
#ifndef HOSTILE_RUNS
#define HOSTILE_RUNS true
#endif

namespace {

/// 2 batch entries, 16 tokens, 2 heads, head dim 16.
struct Call {
  gnaforge_problem problem{};
  gnaforge_tensor tensor[GNAFORGE_ROLES + 2]{};
  const gnaforge_tensor* by_role[GNAFORGE_ROLES + 2]{};
  std::vector<char> data[GNAFORGE_ROLES + 2];
  gnaforge_host host{sizeof(gnaforge_host), 1, parallel_for};
  gnaforge_args args{};
  const gnaforge_args* passed = &args;
  bool wants_words = true;
  int workspace_offset = 0;  ///< From where it is aligned; negative for none.
  bool runs = HOSTILE_RUNS;  ///< If can_run accepts the call: its data are as large as it says.

  static void parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    for (int64_t i = begin; i < end; ++i) body(i, i + 1, context);
  }

  Call() {
    problem.struct_size = sizeof(problem);
    problem.rank = 1;
    problem.batch = 2;
    problem.heads = problem.kv_heads = 2;
    problem.head_dim = problem.value_head_dim = 16;
    problem.scale = 0.25;
    problem.tokens[0] = problem.kv_tokens[0] = problem.grid[0] = 16;
    problem.window[0] = 5;
    problem.stride[0] = problem.dilation[0] = 1;
    for (int role : {GNAFORGE_Q, GNAFORGE_K, GNAFORGE_V, GNAFORGE_OUT, GNAFORGE_LSE}) add(role);
    args.struct_size = sizeof(args);
    args.op = GNAFORGE_GNA_FORWARD;
    args.tensors = by_role;
    args.roles = GNAFORGE_ROLES;
    args.problem = &problem;
    args.host = &host;
  }

  void add(int role) {
    const int channels = role == GNAFORGE_LSE ? 1 : 16;
    data[role].assign(2 * 16 * 2 * 16 * sizeof(float), 0);
    tensor[role] = {sizeof(gnaforge_tensor), HOSTILE_DTYPE, data[role].data(), 32 * channels, {2 * channels}, channels};
    if (role == GNAFORGE_LSE) tensor[role].dtype = GNAFORGE_FP32;
    by_role[role] = &tensor[role];
  }

  /// A piece of 5 extra keys, of which each batch entry has `length`.
  void add_extra(int piece, int length) {
    problem.extra_tokens[piece] = 5;
    args.features = GNAFORGE_FEATURE_EXTRA_KEYS;
    for (int role : {GNAFORGE_EXTRA_K + piece, GNAFORGE_EXTRA_V + piece}) {
      data[role].assign(2 * 5 * 2 * 16 * sizeof(float), 0);
      tensor[role] = {sizeof(gnaforge_tensor), HOSTILE_DTYPE, data[role].data(), 160, {32}, 16};
      by_role[role] = &tensor[role];
    }
    const int role = GNAFORGE_EXTRA_LENGTHS + piece;
    data[role].resize(2 * sizeof(int32_t));
    for (int i = 0; i < 2; ++i) reinterpret_cast<int32_t*>(data[role].data())[i] = length;
    tensor[role] = {sizeof(gnaforge_tensor), GNAFORGE_INT32, data[role].data(), 1, {}, 0};
    by_role[role] = &tensor[role];
  }
};

struct Case {
  std::string name;
  std::function<void(Call&)> change;
};

void tokens(Call& c, int64_t n) { c.problem.tokens[0] = c.problem.kv_tokens[0] = c.problem.grid[0] = n; }

const Case cases[] = {
    {"good", [](Call&) {}},
    {"no args", [](Call& c) { c.passed = nullptr; }},
    {"no problem", [](Call& c) { c.args.problem = nullptr; }},
    {"no tensors", [](Call& c) { c.args.tensors = nullptr; }},
    {"no roles", [](Call& c) { c.args.roles = 0; }},
    {"too few roles", [](Call& c) { c.args.roles = GNAFORGE_OUT; }},
    {"no query", [](Call& c) { c.by_role[GNAFORGE_Q] = nullptr; }},
    {"no out", [](Call& c) { c.by_role[GNAFORGE_OUT] = nullptr; }},
    {"no log_sum_exp", [](Call& c) { c.by_role[GNAFORGE_LSE] = nullptr; }},
    {"no host", [](Call& c) { c.args.host = nullptr; }},
    {"data of query null", [](Call& c) { c.tensor[GNAFORGE_Q].data = nullptr; }},
    {"data of out null", [](Call& c) { c.tensor[GNAFORGE_OUT].data = nullptr; }},
    {"data of log_sum_exp null", [](Call& c) { c.tensor[GNAFORGE_LSE].data = nullptr; }},
    {"small args", [](Call& c) { c.args.struct_size = 8; }},
    {"small problem", [](Call& c) { c.problem.struct_size = 8; }},
    {"small tensor", [](Call& c) { c.tensor[GNAFORGE_K].struct_size = 8; }},
    {"small log_sum_exp", [](Call& c) { c.tensor[GNAFORGE_LSE].struct_size = 0; }},
    {"small host", [](Call& c) { c.host = {4, INT_MAX, nullptr}; }},
    {"large structs", [](Call& c) { c.args.struct_size = c.problem.struct_size = c.tensor[0].struct_size = UINT_MAX; }},
    {"no workspace", [](Call& c) { c.workspace_offset = -1; }},
    {"misaligned workspace", [](Call& c) { c.workspace_offset = 64; }},
    {"no room for words",
     [](Call& c) {
       c.wants_words = false;
       c.problem.rank = 99;
     }},
    {"unknown op", [](Call& c) { c.args.op = 99; }},
    {"another op", [](Call& c) { c.args.op = GNAFORGE_GNA_BACKWARD_Q; }},
    {"unknown feature", [](Call& c) { c.args.features = uint64_t{1} << 63; }},
    {"a feature it hasn't", [](Call& c) { c.args.features = GNAFORGE_FEATURE_HEAD_PATTERNS; }},
    {"a feature that isn't announced", [](Call& c) { c.problem.edge[0] = GNAFORGE_EDGE_CUT; }},
    {"a part of the grid that isn't announced", [](Call& c) { c.problem.grid[0] = 17; }},
    {"extra keys that aren't announced", [](Call& c) { c.problem.extra_tokens[1] = 4; }},
    {"accumulation that isn't announced", [](Call& c) { c.args.accumulate = uint64_t{1} << GNAFORGE_OUT; }},
    {"unknown flags", [](Call& c) { c.args.flags = 0xfffffffe; }},
    {"a tensor of an unknown role",
     [](Call& c) {
       c.args.roles += 1;
       c.add(GNAFORGE_ROLES);
     }},
    {"no tensor of an unknown role", [](Call& c) { c.args.roles += 2; }},
    {"a tensor too many", [](Call& c) { c.add(GNAFORGE_GRAD_Q); }},
    {"a reserved tensor", [](Call& c) { c.add(GNAFORGE_BLOCK_INDEX); }},
    {"unknown device", [](Call& c) { c.args.device = 9; }},
    {"rank 0", [](Call& c) { c.problem.rank = 0; }},
    {"rank -1", [](Call& c) { c.problem.rank = -1; }},
    {"rank 99", [](Call& c) { c.problem.rank = 99; }},
    {"batch 0", [](Call& c) { c.problem.batch = 0; }},
    {"batch -1", [](Call& c) { c.problem.batch = -1; }},
    {"heads -1", [](Call& c) { c.problem.heads = -1; }},
    {"kv_heads 0", [](Call& c) { c.problem.kv_heads = 0; }},
    {"kv_heads INT64_MIN", [](Call& c) { c.problem.kv_heads = INT64_MIN; }},
    {"batch 2^62",
     [](Call& c) {
       c.problem.batch = int64_t{1} << 62;
       c.problem.heads = c.problem.kv_heads = 8;
     }},
    {"heads 2^62",
     [](Call& c) {
       c.problem.batch = 4;
       c.problem.heads = c.problem.kv_heads = int64_t{1} << 62;
     }},
    {"batch 2^40 of 2^30 tokens",
     [](Call& c) {
       tokens(c, (1 << 30) - 1);
       c.problem.batch = int64_t{1} << 40;
     }},
    {"batch 2^62 without strides",
     [](Call& c) {
       c.problem.batch = int64_t{1} << 62;
       for (gnaforge_tensor& tensor : c.tensor) tensor.batch_stride = 0;
     }},
    {"tokens INT64_MAX", [](Call& c) { tokens(c, INT64_MAX); }},
    {"tokens 2^30", [](Call& c) { tokens(c, 1 << 30); }},
    {"tokens -5", [](Call& c) { tokens(c, -5); }},
    {"window 0", [](Call& c) { c.problem.window[0] = 0; }},
    {"window 17", [](Call& c) { c.problem.window[0] = 17; }},
    {"window INT64_MIN", [](Call& c) { c.problem.window[0] = INT64_MIN; }},
    {"stride 6", [](Call& c) { c.problem.stride[0] = 6; }},
    {"dilation 4", [](Call& c) { c.problem.dilation[0] = 4; }},
    {"dilation INT64_MAX", [](Call& c) { c.problem.dilation[0] = INT64_MAX; }},
    {"causal 3", [](Call& c) { c.problem.causal[0] = 3; }},
    {"head_dim 12", [](Call& c) { c.problem.head_dim = 12; }},
    {"head_dim 2^40", [](Call& c) { c.problem.head_dim = int64_t{1} << 40; }},
    {"value_head_dim 0", [](Call& c) { c.problem.value_head_dim = 0; }},
    {"dtype 0", [](Call& c) { c.tensor[GNAFORGE_Q].dtype = 0; }},
    {"dtype 77", [](Call& c) { c.tensor[GNAFORGE_K].dtype = 77; }},
    {"int32 query", [](Call& c) { c.tensor[GNAFORGE_Q].dtype = GNAFORGE_INT32; }},
    {"bf16 log_sum_exp", [](Call& c) { c.tensor[GNAFORGE_LSE].dtype = GNAFORGE_BF16; }},
    {"token stride INT64_MAX", [](Call& c) { c.tensor[GNAFORGE_K].token_stride[0] = INT64_MAX; }},
    {"token stride INT64_MIN", [](Call& c) { c.tensor[GNAFORGE_K].token_stride[0] = INT64_MIN; }},
    {"token stride -2^62", [](Call& c) { c.tensor[GNAFORGE_K].token_stride[0] = -(int64_t{1} << 62); }},
    {"token stride of out 0", [](Call& c) { c.tensor[GNAFORGE_OUT].token_stride[0] = 0; }},
    {"head stride of log_sum_exp 0", [](Call& c) { c.tensor[GNAFORGE_LSE].head_stride = 0; }},
    {"token stride of query 0", [](Call& c) { c.tensor[GNAFORGE_Q].token_stride[0] = 0; }},
    {"strides of one element",
     [](Call& c) {
       c.problem.batch = 1;
       c.tensor[GNAFORGE_Q].batch_stride = INT64_MIN;
     }},
    {"misaligned",
     [](Call& c) {
       tokens(c, 15);
       c.tensor[GNAFORGE_Q].data = c.data[GNAFORGE_Q].data() + 1;
     }},
    {"scale NaN", [](Call& c) { c.problem.scale = NAN; }},
    {"scale 1e308", [](Call& c) { c.problem.scale = 1e308; }},
    {"extra keys, 5 of them", [](Call& c) { c.add_extra(0, 5); }},
    {"extra keys, 0 of them", [](Call& c) { c.add_extra(1, 0); }},
    {"extra keys, INT_MAX of them", [](Call& c) { c.add_extra(0, INT_MAX); }},
    {"extra keys, INT_MIN of them", [](Call& c) { c.add_extra(1, INT_MIN); }},
    {"extra keys of two pieces",
     [](Call& c) {
       c.add_extra(1, 3);
       c.add_extra(0, 4);
     }},
    {"extra keys without lengths",
     [](Call& c) {
       c.add_extra(1, 3);
       c.by_role[GNAFORGE_EXTRA_LENGTHS + 1] = nullptr;
     }},
    {"extra keys without values",
     [](Call& c) {
       c.add_extra(1, 3);
       c.by_role[GNAFORGE_EXTRA_V + 1] = nullptr;
     }},
    {"extra keys that are not there",
     [](Call& c) {
       c.add_extra(1, 3);
       c.problem.extra_tokens[1] = 0;
     }},
    {"extra keys 2^62",
     [](Call& c) {
       c.add_extra(1, 3);
       c.problem.extra_tokens[1] = int64_t{1} << 62;
     }},
    {"extra keys -1",
     [](Call& c) {
       c.add_extra(1, 3);
       c.problem.extra_tokens[1] = -1;
     }},
    {"extra keys 2^40 without strides",
     [](Call& c) {
       c.add_extra(1, 3);
       c.problem.extra_tokens[1] = int64_t{1} << 40;
       for (gnaforge_tensor& tensor : c.tensor) tensor.token_stride[0] *= tensor.token_stride[0] != 32;
       c.tensor[GNAFORGE_OUT].token_stride[0] = 32;
       c.runs = false;
     }},
    {"extra lengths of fp32",
     [](Call& c) {
       c.add_extra(1, 3);
       c.tensor[GNAFORGE_EXTRA_LENGTHS + 1].dtype = GNAFORGE_FP32;
     }},
    {"extra lengths at an odd address",
     [](Call& c) {
       c.add_extra(1, 3);
       c.tensor[GNAFORGE_EXTRA_LENGTHS + 1].data = c.data[GNAFORGE_EXTRA_LENGTHS + 1].data() + 1;
     }},
    {"extra keys' data null",
     [](Call& c) {
       c.add_extra(1, 3);
       c.tensor[GNAFORGE_EXTRA_K + 1].data = nullptr;
     }},
    {"extra lengths' data null",
     [](Call& c) {
       c.add_extra(1, 3);
       c.tensor[GNAFORGE_EXTRA_LENGTHS + 1].data = nullptr;
     }},
    {"threads INT_MAX", [](Call& c) { c.host.threads = INT_MAX; }},
    {"threads -5", [](Call& c) { c.host.threads = -5; }},
    {"no parallel_for", [](Call& c) { c.host = {sizeof(gnaforge_host), 8, nullptr}; }},
};

struct Named {
  const char* name;
  int64_t* value;
};

/// The numbers of a problem, and where they are.
std::vector<Named> numbers(gnaforge_problem& p) {
  std::vector<Named> found = {{"batch", &p.batch},
                              {"heads", &p.heads},
                              {"kv_heads", &p.kv_heads},
                              {"head_dim", &p.head_dim},
                              {"value_head_dim", &p.value_head_dim}};
  const Named arrays[] = {{"tokens", p.tokens},       {"window", p.window},       {"stride", p.stride},
                          {"dilation", p.dilation},   {"causal", p.causal},       {"edge", p.edge},
                          {"sink", p.sink},           {"grid", p.grid},           {"q_offset", p.q_offset},
                          {"kv_tokens", p.kv_tokens}, {"kv_offset", p.kv_offset}, {"kv_sink", p.kv_sink}};
  found.insert(found.end(), std::begin(arrays), std::end(arrays));
  for (int64_t& piece : p.extra_tokens) found.push_back({"extra_tokens", &piece});
  return found;
}

constexpr const char* roles[] = {"query", "key", "value", "out", "log_sum_exp"};

/// The first `size` bytes of a struct, where their memory ends, so that whoever reads on dies.
template <class T>
T* cut(const T& whole, uint32_t size) {
  T copy = whole;
  copy.struct_size = size;
  const size_t bytes = std::max<size_t>(size, sizeof(size));
  return static_cast<T*>(std::memcpy(std::malloc(bytes), &copy, bytes));
}

/// Each struct of every size below its own, each pointer null, each tensor at odd addresses and with strides as large
/// as they can be, each number of the problem likewise.
std::vector<Case> every_field() {
  std::vector<Case> found;
  const auto text = [](auto... parts) { return (... + (std::string(parts) + " ")); };
  const auto add = [&found](std::string name, std::function<void(Call&)> change) {
    name.pop_back();
    found.push_back({name, std::move(change)});
  };
  for (uint32_t size = 0; size < sizeof(gnaforge_args); size += 4)
    add(text("size", std::to_string(size), "args"), [size](Call& c) { c.passed = cut(c.args, size); });
  for (uint32_t size = 0; size < sizeof(gnaforge_problem); size += 4)
    add(text("size", std::to_string(size), "problem"), [size](Call& c) { c.args.problem = cut(c.problem, size); });
  for (uint32_t size = 0; size < sizeof(gnaforge_host); size += 4)
    add(text("size", std::to_string(size), "host"), [size](Call& c) { c.args.host = cut(c.host, size); });
  for (int role = 0; role < 5; ++role) {
    const char* const name = roles[role];
    for (uint32_t size = 0; size < sizeof(gnaforge_tensor); size += 4)
      add(text("size", std::to_string(size), name),
          [role, size](Call& c) { c.by_role[role] = cut(c.tensor[role], size); });
    add(text("null", name), [role](Call& c) { c.by_role[role] = nullptr; });
    add(text("null data", name), [role](Call& c) { c.tensor[role].data = nullptr; });
    for (int offset = 1; offset <= 4; ++offset)
      add(text("offset", std::to_string(offset), name), [role, offset](Call& c) {
        tokens(c, 15);
        c.tensor[role].data = c.data[role].data() + offset;
      });
    for (const char* field : {"batch", "tokens", "heads"})
      for (const int power : {0, 30, 40, 57, 58, 59, 60, 61, 62, 63})
        for (const int64_t sign : {1, -1}) {
          const auto power_of_two = static_cast<int64_t>(uint64_t{1} << power);  // -2^63 for 63
          const int64_t stride = power == 0    ? 0
                                 : power == 63 ? (sign > 0 ? INT64_MAX : INT64_MIN)
                                               : sign * power_of_two;
          add(text("stride", std::to_string(stride), field, name), [=](Call& c) {
            gnaforge_tensor& tensor = c.tensor[role];
            (field[0] == 'b'   ? tensor.batch_stride
             : field[0] == 't' ? tensor.token_stride[0]
                               : tensor.head_stride) = stride;
            c.runs = false;
          });
        }
  }
  Call plain;
  const auto plain_numbers = numbers(plain.problem);
  for (size_t i = 0; i < plain_numbers.size(); ++i)
    for (const int64_t value :
         {INT64_MIN, INT64_MIN + 1, -(int64_t{1} << 32), int64_t{-1}, int64_t{0}, int64_t{1} << 31,
          (int64_t{1} << 32) + *plain_numbers[i].value, int64_t{1} << 40, int64_t{1} << 62, INT64_MAX})
      add(text("problem", std::to_string(value), plain_numbers[i].name, std::to_string(i)), [=](Call& c) {
        *numbers(c.problem)[i].value = value;
        c.runs = false;
      });
  return found;
}

void try_case(const gnaforge_entry& entry, const Case& one) {
  Call call;
  one.change(call);
  char text[300] = "";
  char* const words = call.wants_words ? text : nullptr;
  const size_t room = call.wants_words ? sizeof(text) : 0;
  const int code = entry.can_run(call.passed, words, room);
  std::printf("%d", code);
  if (code == GNAFORGE_OK) {
    const int64_t bytes = entry.workspace_bytes(call.passed);
    if (!(entry.visited_work(call.passed) >= 0) || bytes < 0 || bytes > (1 << 24)) std::abort();
    void* const memory = std::aligned_alloc(256, static_cast<size_t>(bytes + 255) / 256 * 256 + 256);
    void* const workspace = call.workspace_offset < 0 ? nullptr : static_cast<char*>(memory) + call.workspace_offset;
    if (call.runs) std::printf(" %d", entry.run(call.passed, workspace, nullptr, words, room));
    std::free(memory);
  }
  std::printf("\t%s", text);
}

}  // namespace

int main() {
  const gnaforge_library* const library = gnaforge_library_v1();
  std::vector<Case> all = every_field();
  all.insert(all.begin(), std::begin(cases), std::end(cases));
  for (const Case& one : all) {
    std::printf("%s\t", one.name.c_str());
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      try_case(*library->entries[0], one);
      std::fflush(stdout);
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    std::printf("%s\n", status == 0 ? "" : "\tdied");
  }
}
