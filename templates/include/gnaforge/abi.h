/* The contract between kernel libraries and the core that calls them: plain C, versioned.
 *
 * A library exports exactly one function, gnaforge_library_v1. Every struct that crosses the boundary begins with its
 * size as the writer knew it. Structs grow at their end only: a reader looks at a field only if GNAFORGE_HAS says that
 * the writer knew it. What a call needs beyond version 1.0 is announced in gnaforge_args.features; a kernel refuses
 * bits that it doesn't know, so an old library never runs a problem that it would get wrong. The major version
 * changes only when this can't hold, and then the function's name changes too.
 */
#ifndef GNAFORGE_ABI_H
#define GNAFORGE_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GNAFORGE_ABI_MAJOR 1u
#define GNAFORGE_ABI_MINOR 0u
#define GNAFORGE_ABI_VERSION ((GNAFORGE_ABI_MAJOR << 16) | GNAFORGE_ABI_MINOR)
#define GNAFORGE_MAX_RANK 3

/* True if the struct that `object` points to reaches past `field`. */
#define GNAFORGE_HAS(object, field) \
  ((object)->struct_size >= (size_t)((const char*)(&(object)->field + 1) - (const char*)(object)))

enum gnaforge_dtype { GNAFORGE_FP32 = 1, GNAFORGE_BF16 = 2, GNAFORGE_FP16 = 3 };

enum gnaforge_device { GNAFORGE_CPU = 0, GNAFORGE_CUDA = 1 };

/* gnaforge_library.flags: built against the functional emulator; takes CPU tensors for a GPU arch. */
#define GNAFORGE_LIBRARY_EMULATED 1u

/* A heads-last tensor [batch, tokens..., heads, channels]; the log-sum-exp has no channels. Strides in elements; the
 * channels are contiguous. */
typedef struct gnaforge_tensor {
  uint32_t struct_size;
  uint32_t dtype; /* enum gnaforge_dtype */
  void* data;
  int64_t batch_stride;
  int64_t token_stride[GNAFORGE_MAX_RANK];
  int64_t head_stride;
} gnaforge_tensor;

/* What a call asks for; arrays hold `rank` entries, outermost token dimension first. */
typedef struct gnaforge_problem {
  uint32_t struct_size;
  int32_t rank;
  int64_t batch;
  int64_t tokens[GNAFORGE_MAX_RANK];
  int64_t window[GNAFORGE_MAX_RANK];
  int64_t stride[GNAFORGE_MAX_RANK];
  int64_t dilation[GNAFORGE_MAX_RANK];
  int64_t causal[GNAFORGE_MAX_RANK]; /* 0 or 1 */
  int64_t heads;
  int64_t kv_heads; /* divides heads; query head h reads head h / (heads / kv_heads) */
  int64_t head_dim;
  int64_t value_head_dim;
  double scale; /* of Q K^T, before the softmax */
} gnaforge_problem;

/* Services of the caller. parallel_for calls body on disjoint ranges that cover [begin, end), from several threads,
 * and returns when all are done; it is set for CPU tensors. */
typedef struct gnaforge_host {
  uint32_t struct_size;
  int32_t threads;
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                       void* context);
} gnaforge_host;

/* One call. Pointers stay the caller's. `out` and `log_sum_exp` may have null data in can_run, workspace_bytes and
 * visited_work, which only look at problem, layout and alignment. */
typedef struct gnaforge_args {
  uint32_t struct_size;
  uint32_t device;       /* enum gnaforge_device: where the tensors are */
  int32_t device_index;  /* among the devices of that kind */
  uint32_t reserved;     /* 0 */
  uint64_t features;     /* what this call needs beyond version 1.0; a kernel refuses unknown bits */
  const gnaforge_problem* problem;
  const gnaforge_tensor* q;
  const gnaforge_tensor* k;
  const gnaforge_tensor* v;
  gnaforge_tensor* out;
  gnaforge_tensor* log_sum_exp; /* float32, natural logarithm */
  const gnaforge_host* host;
} gnaforge_args;

/* A kernel. Facts are fixed; functions return what their comment says and never throw. */
typedef struct gnaforge_entry {
  uint32_t struct_size;
  uint32_t threads;       /* per CTA; 0 on cpu */
  uint32_t shared_memory; /* bytes per CTA; 0 on cpu */
  uint32_t device;        /* enum gnaforge_device: where it runs */
  const char* key;        /* names op, arch, rank, dtype, head dims and tiles; see codegen/runtime/config.py */

  /* 1 if this kernel computes the problem; else 0, with the reason in why[0..n). */
  int (*can_run)(const gnaforge_args* args, char* why, size_t n);

  /* Bytes of workspace that run needs, aligned to 256. */
  int64_t (*workspace_bytes)(const gnaforge_args* args);

  /* Multiply-adds of the tiles that run visits, padding included: the least wins when several kernels fit. */
  double (*visited_work)(const gnaforge_args* args);

  /* Runs on `stream` (a cudaStream_t; unused on cpu). 0 on success; else the reason is in err[0..n). */
  int (*run)(const gnaforge_args* args, void* workspace, void* stream, char* err, size_t n);
} gnaforge_entry;

typedef struct gnaforge_library {
  uint32_t struct_size;
  uint32_t abi; /* GNAFORGE_ABI_VERSION that it was built with */
  uint32_t flags;
  uint32_t count;
  const gnaforge_entry* const* entries;
} gnaforge_library;

/* The one symbol that a kernel library exports. */
const gnaforge_library* gnaforge_library_v1(void);

#ifdef __cplusplus
}
#endif

#endif
