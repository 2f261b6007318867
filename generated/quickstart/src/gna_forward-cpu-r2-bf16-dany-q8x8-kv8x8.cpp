// gna_forward-cpu-r2-bf16-dany-q8x8-kv8x8
#include "gnaforge/cpu/forward/kernel.h"

namespace {

struct Config {
  static constexpr const char* key = "gna_forward-cpu-r2-bf16-dany-q8x8-kv8x8";
  static constexpr gnaforge_op op = GNAFORGE_GNA_FORWARD;
  static constexpr std::uint64_t features = GNAFORGE_FEATURE_EDGE | GNAFORGE_FEATURE_BLOCK_CAUSAL | GNAFORGE_FEATURE_SINK | GNAFORGE_FEATURE_RANGE | GNAFORGE_FEATURE_KV_SINK | GNAFORGE_FEATURE_EXTRA_KEYS | GNAFORGE_FEATURE_DETERMINISTIC;
  static constexpr gnaforge_dtype dtype = GNAFORGE_BF16;
  static constexpr gnaforge_dtype out_dtype = GNAFORGE_BF16;
  static constexpr int head_dim = 0;  // any
  static constexpr int value_head_dim = 0;  // as head_dim
  using QTile = gnaforge::Box<8, 8>;
  using KvTile = gnaforge::Box<8, 8>;
};

}  // namespace

extern "C" {
extern const gnaforge_entry gnaforge_entry_gna_forward_cpu_r2_bf16_dany_q8x8_kv8x8;
const gnaforge_entry gnaforge_entry_gna_forward_cpu_r2_bf16_dany_q8x8_kv8x8 = gnaforge::cpu::make_entry<Config>();
}
