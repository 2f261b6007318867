// A kernel library whose kernels are trivial, to test the contract: what it claims is set on the command line.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "gnaforge/abi.h"

#ifndef TOY_ABI
#define TOY_ABI GNAFORGE_ABI_VERSION
#endif
#ifndef TOY_VALUE
#define TOY_VALUE 1.0f
#endif
#ifndef TOY_WORK
#define TOY_WORK 1.0
#endif
#ifndef TOY_OP
#define TOY_OP GNAFORGE_GNA_FORWARD
#endif
#ifndef TOY_FEATURES
#define TOY_FEATURES 0
#endif
#ifndef TOY_CODE  // what can_run says of calls that it could compute
#define TOY_CODE GNAFORGE_OK
#endif
#ifndef TOY_WORKSPACE
#define TOY_WORKSPACE 16
#endif
#ifndef TOY_FLAGS
#define TOY_FLAGS 0
#endif
#ifndef TOY_STATEMENT
#define TOY_STATEMENT
#endif
// What the stand-in for CUDA would report of a call, as JSON: then the library is one of the emulator's.
#ifdef TOY_REPORT
extern "C" {
void gnaforge_standin_reset(const void*) {}
void gnaforge_standin_announce(uint64_t, uint64_t, const char*) {}
void gnaforge_standin_withdraw(uint64_t) {}
const char* gnaforge_standin_report() { return TOY_REPORT; }
}
#endif
#ifndef TOY_RUN
#define TOY_RUN run
#endif
#ifndef TOY_CALLS_WORKSPACE
#define TOY_CALLS_WORKSPACE nullptr
#endif
#ifndef TOY_RUN_CALLS
#define TOY_RUN_CALLS nullptr
#endif
#if GNAFORGE_ABI_MINOR >= 1
#define TOY_LISTS , TOY_CALLS_WORKSPACE, TOY_RUN_CALLS
#else
#define TOY_LISTS
#endif
#ifndef TOY_ENTRY
#define TOY_ENTRY &entry
#endif
#ifndef TOY_ENTRIES
#define TOY_ENTRIES entries
#endif
#ifndef TOY_LIBRARY
#define TOY_LIBRARY &library
#endif
#ifndef TOY_ENTRY_SIZE
#define TOY_ENTRY_SIZE sizeof(gnaforge_entry)
#endif

namespace {

int can_run(const gnaforge_args* args, char* why, size_t n) {
  if ((args->features & ~static_cast<uint64_t>(TOY_FEATURES)) != 0 ||
      args->tensors[GNAFORGE_Q]->dtype != GNAFORGE_FP32 || args->problem->head_dim != 8) {
    std::snprintf(why, n, "the toy takes fp32 and head_dim 8, got head_dim %d",
                  static_cast<int>(args->problem->head_dim));
    return GNAFORGE_NO_HEAD_DIM;
  }
  if (!(args->problem->scale > 0)) {
    std::snprintf(why, n, "the toy takes positive scales, got %g", args->problem->scale);
    return GNAFORGE_NO_SCALE;
  }
  return TOY_CODE;
}

float* data(const gnaforge_args* args, gnaforge_role role) { return static_cast<float*>(args->tensors[role]->data); }

int64_t workspace_bytes(const gnaforge_args*) { return TOY_WORKSPACE; }

double visited_work(const gnaforge_args*) { return TOY_WORK; }

/// Fills the output with a constant, so that a test sees which kernel ran.
int run(const gnaforge_args* args, void* workspace, void*, char* err, size_t n) {
  TOY_STATEMENT;
  if (workspace == nullptr) {
    std::snprintf(err, n, "no workspace");
    return GNAFORGE_BAD_CALL;
  }
  const gnaforge_problem& p = *args->problem;
  int64_t rows = p.batch * p.heads;
  for (int d = 0; d < p.rank; ++d) rows *= p.tokens[d];
  if (p.scale == 0.5) {
    std::snprintf(err, n, "the toy fails at scale 0.5: \"quoted\" \xc3\xbc");
    return GNAFORGE_FAILED;
  }
  if (p.scale == 0.25) {
    std::snprintf(err, n, "the toy needs 5 bytes at scale 0.25");
    return GNAFORGE_OUT_OF_MEMORY;
  }
  for (int64_t i = 0; i < rows * p.value_head_dim; ++i) data(args, GNAFORGE_OUT)[i] = TOY_VALUE;
  for (int64_t i = 0; i < rows; ++i) data(args, GNAFORGE_LSE)[i] = TOY_VALUE;
  return GNAFORGE_OK;
}

const gnaforge_entry entry = {TOY_ENTRY_SIZE,  TOY_OP,       TOY_FEATURES,     0, 0, GNAFORGE_CPU, 0, TOY_KEY, can_run,
                              workspace_bytes, visited_work, TOY_RUN TOY_LISTS};
const gnaforge_entry* const entries[] = {TOY_ENTRY};
const gnaforge_library library = {sizeof(gnaforge_library), TOY_ABI, TOY_FLAGS, 1, TOY_ENTRIES};

}  // namespace

extern "C" __attribute__((visibility("default"))) const gnaforge_library* gnaforge_library_v1(void) {
  return TOY_LIBRARY;
}
