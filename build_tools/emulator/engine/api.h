// The engine's C interface, for Python and for the stand-in of the CUDA libraries.
#pragma once
#include <stdint.h>

#define GNAFORGE_EXPORT extern "C" __attribute__((visibility("default")))

/// What the caller of a launch chooses; mirrored in Python.
struct GnaforgeEmulatorLaunch {
  uint32_t grid[3], block[3];
  uint32_t dynamic_shared, timing, order, host_threads, relaxed_warpgroups, relaxed_tensor_frees, relaxed_tensor_waits,
      relaxed_tensor_fences, trace, unchecked, early;
  uint64_t seed, patience;
};

/// What was counted; mirrored in Python.
struct GnaforgeEmulatorCounters {
  uint64_t instructions, async_load_bytes, async_store_bytes, load_bytes, store_bytes;
  uint64_t interior_tiles, shell_tiles, interior_instructions, shell_instructions, mma_operations;
};

/// The last error of this thread.
GNAFORGE_EXPORT const char* gnaforge_emulator_error();

/// Parses a module. Null with the last error set if it can't be.
GNAFORGE_EXPORT void* gnaforge_emulator_module(const char* text, const char* name);
GNAFORGE_EXPORT void gnaforge_emulator_module_free(void* module);
/// The module's kernels and instructions as JSON; valid until this thread's next call.
GNAFORGE_EXPORT const char* gnaforge_emulator_describe(void* module);
/// Counts per instruction, added up by opcode, as JSON; markers (pmevent) are left out. Valid until this thread's next
/// call.
GNAFORGE_EXPORT const char* gnaforge_emulator_opcode_counts(void* module, const uint64_t* executed);
/// Number of the module's instructions: the length of `executed` and `waited` below.
GNAFORGE_EXPORT uint64_t gnaforge_emulator_instructions(void* module);
/// Number of a kernel's parameters and the bytes that they take; -1 if there is no such kernel.
GNAFORGE_EXPORT int gnaforge_emulator_params(void* module, const char* kernel, uint32_t* bytes);
/// Offset and size of one parameter.
GNAFORGE_EXPORT void gnaforge_emulator_param(void* module, const char* kernel, int index, uint32_t* offset,
                                             uint32_t* size);
/// Address and size of a module-scope variable; 0 if there is none of that name.
GNAFORGE_EXPORT uint64_t gnaforge_emulator_variable(void* module, const char* name, uint64_t* size);

/// The ranges that kernels may touch.
GNAFORGE_EXPORT void* gnaforge_emulator_memory();
GNAFORGE_EXPORT void gnaforge_emulator_memory_free(void* memory);
GNAFORGE_EXPORT void gnaforge_emulator_memory_add(void* memory, uint64_t address, uint64_t size, const char* name);
GNAFORGE_EXPORT void gnaforge_emulator_memory_remove(void* memory, uint64_t address);
/// Allows what the process has mapped as well: kernels that get pointers to memory which nobody announced.
GNAFORGE_EXPORT void gnaforge_emulator_memory_allow_mapped(void* memory);
/// Somebody has waited for all launches so far: the next one can't run beside them.
GNAFORGE_EXPORT void gnaforge_emulator_memory_settle(void* memory);

/// Runs a kernel. `executed` and `waited`, if not null, take a count per instruction: how often it ran, and how often
/// an mbarrier wait found its phase open. 0, or 1 with the last error set.
GNAFORGE_EXPORT int gnaforge_emulator_launch(void* module, const char* kernel, const GnaforgeEmulatorLaunch* how,
                                             const void* params, uint64_t param_bytes, void* memory,
                                             GnaforgeEmulatorCounters* counted, uint64_t* executed, uint64_t* waited);

/// While on, launches of this thread on one host thread record what synchronises; turning it on forgets what was
/// recorded.
GNAFORGE_EXPORT void gnaforge_emulator_record(int on);
/// What recording.h describes, until this thread turns recording on again.
GNAFORGE_EXPORT const void* gnaforge_emulator_records(uint64_t* count);

/// Arguments as cuTensorMapEncodeTiled has them; `out` is 128 bytes aligned to 64. 0, or 1 with the broken rule as
/// error.
GNAFORGE_EXPORT int gnaforge_emulator_tensor_map(void* out, uint32_t data_type, uint32_t rank, uint64_t address,
                                                 const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                                                 const uint32_t* element_strides, uint32_t interleave, uint32_t swizzle,
                                                 uint32_t promotion, uint32_t fill);
