// Kernel library quickstart: the table of its 2 kernels. Rendered by gnaforge; edits are lost.
#include "gnaforge/abi.h"

extern "C" {
extern const gnaforge_entry gnaforge_entry_gna_forward_cpu_r2_bf16_dany_q8x8_kv8x8;
extern const gnaforge_entry gnaforge_entry_gna_forward_cpu_r2_fp32_dany_q8x8_kv8x8;

static const gnaforge_entry* const entries[] = {
    &gnaforge_entry_gna_forward_cpu_r2_bf16_dany_q8x8_kv8x8,
    &gnaforge_entry_gna_forward_cpu_r2_fp32_dany_q8x8_kv8x8,
};

static const gnaforge_library library = {sizeof(gnaforge_library), GNAFORGE_ABI_VERSION, 0, 2,
                                         entries};

__attribute__((visibility("default"))) const gnaforge_library* gnaforge_library_v1(void) { return &library; }
}
