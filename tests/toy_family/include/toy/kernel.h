// Attention by plain loops: every query over the keys that it sees, in double. All of a kernel family's C++.
#pragma once

#include <cmath>
#include <cstdint>

#include "gnaforge/entry.h"
#include "gnaforge/gna/tiles.h"

namespace toy {

template <class Config>
struct Kernel {
  static constexpr int rank = Config::QTile::rank;
  static constexpr gnaforge::Traits traits{Config::op, GNAFORGE_CPU, Config::features};
  static_assert(Config::dtype == GNAFORGE_FP32 && Config::out_dtype == GNAFORGE_FP32, "the toy computes in fp32");

  static int can_run(const gnaforge_args* args, char* why, std::size_t n) {
    return gnaforge::check_call<Config>(args, traits, gnaforge::Reason{why, n});
  }

  static std::int64_t workspace_bytes(const gnaforge_args*) { return 0; }

  static double visited_work(const gnaforge_args* args) {
    gnaforge::Axis axes[rank];
    gnaforge::copy_axes(*args->problem, axes);
    // As the family's padding says: all keys that a Q tile sees, for each of its queries.
    const auto seen = gnaforge::count_tiles<typename Config::QTile, gnaforge::OneKey>(axes).visited;
    return gnaforge::visited_work(*args->problem, static_cast<double>(seen) * Config::QTile::volume);
  }

  static int run(const gnaforge_args* args, void*, void*, char* error, std::size_t n) {
    if (const gnaforge_code code = gnaforge::check::data(*args, gnaforge::Reason{error, n})) return code;
    gnaforge::Axis axes[rank];
    gnaforge::copy_axes(*args->problem, axes);
    const gnaforge_problem& p = *args->problem;
    for (std::int64_t batch = 0; batch < p.batch; ++batch)
      for (std::int64_t head = 0; head < p.heads; ++head) {
        std::int64_t query[rank] = {};
        do attend(*args, axes, batch, head, query);
        while (next(query, p.tokens));
      }
    return GNAFORGE_OK;
  }

 private:
  /// Goes on to the next token of a box that begins at 0; false after the last one.
  static bool next(std::int64_t (&at)[rank], const std::int64_t* extent) {
    for (int d = rank - 1; d >= 0; --d) {
      if (++at[d] < extent[d]) return true;
      at[d] = 0;
    }
    return false;
  }

  static float* row(const gnaforge_tensor& tensor, std::int64_t batch, std::int64_t head,
                    const std::int64_t (&at)[rank]) {
    std::int64_t offset = batch * tensor.batch_stride + head * tensor.head_stride;
    for (int d = 0; d < rank; ++d) offset += at[d] * tensor.token_stride[d];
    return static_cast<float*>(tensor.data) + offset;
  }

  static void attend(const gnaforge_args& args, const gnaforge::Axis (&axes)[rank], std::int64_t batch,
                     std::int64_t head, const std::int64_t (&query)[rank]) {
    const gnaforge_problem& p = *args.problem;
    const std::int64_t kv_head = head / (p.heads / p.kv_heads);
    const float* q = row(*gnaforge::tensor_of(args, GNAFORGE_Q), batch, head, query);
    std::int64_t begin[rank], extent[rank], step[rank] = {};
    for (int d = 0; d < rank; ++d) {
      const int group = static_cast<int>(query[d] % p.dilation[d]);
      const gnaforge::Interval seen =
          gnaforge::window(gnaforge::group_axis(axes[d], group), static_cast<int>(query[d] / p.dilation[d]));
      begin[d] = seen.begin * p.dilation[d] + group;
      extent[d] = seen.end - seen.begin;
    }
    double max = -INFINITY, sum = 0, out[gnaforge::max_head_dim] = {};
    do {
      std::int64_t key[rank];
      for (int d = 0; d < rank; ++d) key[d] = begin[d] + step[d] * p.dilation[d];
      const float* k = row(*gnaforge::tensor_of(args, GNAFORGE_K), batch, kv_head, key);
      const float* v = row(*gnaforge::tensor_of(args, GNAFORGE_V), batch, kv_head, key);
      double score = 0;
      for (std::int64_t c = 0; c < p.head_dim; ++c) score += double{q[c]} * k[c];
      score *= p.scale;
      const double larger = std::fmax(max, score), kept = std::exp(max - larger), weight = std::exp(score - larger);
      sum = sum * kept + weight;
      for (std::int64_t c = 0; c < p.value_head_dim; ++c) out[c] = out[c] * kept + weight * v[c];
      max = larger;
    } while (next(step, extent));
    float* result = row(*gnaforge::tensor_of(args, GNAFORGE_OUT), batch, head, query);
    for (std::int64_t c = 0; c < p.value_head_dim; ++c) result[c] = static_cast<float>(out[c] / sum);
    const gnaforge_tensor* lse = gnaforge::tensor_of(args, GNAFORGE_LSE);
    if (lse != nullptr && lse->data != nullptr)
      *row(*lse, batch, head, query) = static_cast<float>(max + std::log(sum));
  }
};

template <class Config>
constexpr gnaforge_entry make_entry() {
  using K = Kernel<Config>;
  return {sizeof(gnaforge_entry),
          K::traits.op,
          K::traits.features,
          0,
          0,
          GNAFORGE_CPU,
          0,
          Config::key,
          K::can_run,
          K::workspace_bytes,
          K::visited_work,
          K::run,
          nullptr,
          nullptr};
}

}  // namespace toy
