/* The contract between kernel libraries and the core that calls them: plain C, versioned. This is version 1.2.
 *
 * A library exports exactly one function, gnaforge_library_v1. Every struct that crosses the boundary begins with its
 * size as the writer knew it.
 *
 * Frozen from version 1.0 on:
 *  - the function's name, and the order, types, values and meaning of all that this header declares;
 *  - structs grow at their end only and without padding, enums only by new values, features only by new bits. A reader
 *    looks at a field only if GNAFORGE_HAS says that the writer knew it, and at a tensor only if its role is below
 *    gnaforge_args.roles;
 *  - what a call needs beyond a plain window is announced in gnaforge_args.features, one bit each. An entry says in its
 *    own `features` which of them it has. The core asks no entry for a call that needs others, and the entry refuses
 *    such a call all the same, as it does another op and a tensor whose role it doesn't know. So a library that was
 *    built before something was thought of never runs a call that it would get wrong;
 *  - a field that belongs to a feature holds its neutral value where the bit is not set, so whoever doesn't know the
 *    feature need not look at it;
 *  - gnaforge_args.flags never change a result: an entry may ignore those that it doesn't know.
 * GNAFORGE_ABI_MINOR counts what was added. GNAFORGE_ABI_MAJOR changes only when the above can't hold, and then the
 * function's name changes too.
 */
#ifndef GNAFORGE_ABI_H
#define GNAFORGE_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GNAFORGE_ABI_MAJOR 1u
#define GNAFORGE_ABI_MINOR 2u
#define GNAFORGE_ABI_VERSION ((GNAFORGE_ABI_MAJOR << 16) | GNAFORGE_ABI_MINOR)
#define GNAFORGE_MAX_RANK 3
#define GNAFORGE_MAX_EXTRA 2 /* pieces of extra keys */

/* True if the struct that `object` points to reaches past `field`. */
#define GNAFORGE_HAS(object, field) \
  ((object)->struct_size >= (size_t)((const char*)(&(object)->field + 1) - (const char*)(object)))

enum gnaforge_dtype {
  GNAFORGE_FP32 = 1,
  GNAFORGE_BF16 = 2,
  GNAFORGE_FP16 = 3,
  GNAFORGE_INT32 = 4,
  GNAFORGE_E4M3 = 5 /* 8 bits: 4 of exponent, 3 of mantissa, no infinity, up to 448. From version 1.2 on */
};

enum gnaforge_device { GNAFORGE_CPU = 0, GNAFORGE_CUDA = 1 };

/* What an entry computes. */
enum gnaforge_op {
  GNAFORGE_GNA_FORWARD = 1,    /* OUT and LSE of Q, K, V */
  GNAFORGE_GNA_BACKWARD_Q = 2, /* GRAD_Q of Q, K, V, OUT, LSE, GRAD_OUT and GRAD_LSE */
  GNAFORGE_GNA_BACKWARD_KV = 3 /* GRAD_K and GRAD_V of the same, and with extra keys GRAD_EXTRA_K and GRAD_EXTRA_V */
};

/* What a tensor is to a call: its place in gnaforge_args.tensors. H, H_kv, D, D_v: heads, kv_heads, head_dim and
 * value_head_dim of the problem; extra: its extra_tokens. Where no dtype is given the kernel says which it takes. */
enum gnaforge_role {
  GNAFORGE_Q = 0,              /* [batch, tokens.., H, D] */
  GNAFORGE_K = 1,              /* [batch, kv_tokens.., H_kv, D] */
  GNAFORGE_V = 2,              /* [batch, kv_tokens.., H_kv, D_v] */
  GNAFORGE_OUT = 3,            /* [batch, tokens.., H, D_v] */
  GNAFORGE_LSE = 4,            /* [batch, tokens.., H], float32, natural logarithm; forward may go without */
  GNAFORGE_GRAD_OUT = 5,       /* as OUT */
  GNAFORGE_GRAD_LSE = 6,       /* as LSE; absent: zero */
  GNAFORGE_GRAD_Q = 7,         /* as Q */
  GNAFORGE_GRAD_K = 8,         /* as K */
  GNAFORGE_GRAD_V = 9,         /* as V */
  GNAFORGE_DELTA = 10,         /* as LSE: sum over channels of OUT * GRAD_OUT, less GRAD_LSE. A backward op writes it
                                   if the call has it; with GNAFORGE_FEATURE_DELTA it reads it instead */
  GNAFORGE_EXTRA_K = 11,       /* and 12: [batch, extra, H_kv, D], of the first and the second piece */
  GNAFORGE_EXTRA_V = 13,       /* and 14: [batch, extra, H_kv, D_v]; finite beyond the length, too */
  GNAFORGE_EXTRA_LENGTHS = 15, /* and 16: [batch], int32: keys that count, cut to [0, extra]; absent: all */
  GNAFORGE_GRAD_EXTRA_K = 17,  /* and 18: as EXTRA_K */
  GNAFORGE_GRAD_EXTRA_V = 19,  /* and 20: as EXTRA_V */
  GNAFORGE_DESCALE_Q = 21,     /* [batch, H], float32, positive: what a number of Q is multiplied by; absent: 1 */
  GNAFORGE_DESCALE_K = 22,     /* [batch, H_kv], likewise of K and of extra keys */
  GNAFORGE_DESCALE_V = 23,     /* [batch, H_kv], likewise of V and of their values */
  GNAFORGE_BLOCK_INDEX = 24,   /* reserved, of lists of key boxes */
  GNAFORGE_BLOCK_COUNTS = 25,  /* reserved */
  GNAFORGE_ROLES = 26          /* how many there are in this version */
};

/* What a call may need beyond a window that shifts inwards at the borders, with strides, dilation, causal tokens. */
#define GNAFORGE_FEATURE_EDGE (UINT64_C(1) << 0)           /* an `edge` other than GNAFORGE_EDGE_SHIFT */
#define GNAFORGE_FEATURE_BLOCK_CAUSAL (UINT64_C(1) << 1)   /* a `causal` of GNAFORGE_CAUSAL_BLOCK */
#define GNAFORGE_FEATURE_SINK (UINT64_C(1) << 2)           /* a `sink` above 0 */
#define GNAFORGE_FEATURE_RANGE (UINT64_C(1) << 3)          /* queries or keys are a part of the grid */
#define GNAFORGE_FEATURE_KV_SINK (UINT64_C(1) << 4)        /* a `kv_sink` above 0 */
#define GNAFORGE_FEATURE_EXTRA_KEYS (UINT64_C(1) << 5)     /* an `extra_tokens` above 0 */
#define GNAFORGE_FEATURE_HEAD_PATTERNS (UINT64_C(1) << 6)  /* reserved: windows of their own for heads */
#define GNAFORGE_FEATURE_VARLEN (UINT64_C(1) << 7)         /* reserved: token extents of their own for samples */
#define GNAFORGE_FEATURE_ACCUMULATE (UINT64_C(1) << 8)     /* gradients are added to what is there: see `accumulate` */
#define GNAFORGE_FEATURE_DELTA (UINT64_C(1) << 9)          /* backward: takes DELTA in place of OUT and GRAD_LSE */
#define GNAFORGE_FEATURE_DESCALE (UINT64_C(1) << 10)       /* there may be DESCALE_Q, _K and _V. From 1.2 on */
#define GNAFORGE_FEATURE_BLOCK_LISTS (UINT64_C(1) << 11)   /* reserved: BLOCK_INDEX and BLOCK_COUNTS */
#define GNAFORGE_FEATURE_DETERMINISTIC (UINT64_C(1) << 12) /* the same bits each time, on one device */

enum gnaforge_edge {
  GNAFORGE_EDGE_SHIFT = 0, /* a window that would leave the grid is shifted inwards */
  GNAFORGE_EDGE_CUT = 1,   /* it is cut */
  GNAFORGE_EDGE_WRAP = 2   /* it goes on at the other end */
};

enum gnaforge_causal {
  GNAFORGE_CAUSAL_NONE = 0,
  GNAFORGE_CAUSAL_TOKEN = 1, /* no key after the query */
  GNAFORGE_CAUSAL_BLOCK = 2  /* no key after the query's group of `stride` queries */
};

/* Why a call is refused, or failed. Readers take codes that they don't know for GNAFORGE_NO_OTHER. */
enum gnaforge_code {
  GNAFORGE_OK = 0,
  GNAFORGE_BAD_CALL = 1,  /* the contract is broken: a struct is too small, a tensor is missing or too much */
  GNAFORGE_BAD_INPUT = 2, /* no kernel can compute this */
  GNAFORGE_NO_OP = 3,     /* from here on: another kernel may. This one computes another op */
  GNAFORGE_NO_FEATURE = 4,
  GNAFORGE_NO_DEVICE = 5,   /* the tensors are elsewhere */
  GNAFORGE_NO_HARDWARE = 6, /* this device can't run it */
  GNAFORGE_NO_RANK = 7,
  GNAFORGE_NO_DTYPE = 8,
  GNAFORGE_NO_HEAD_DIM = 9,
  GNAFORGE_NO_SCALE = 10,
  GNAFORGE_NO_LAYOUT = 11, /* alignment or strides: contiguous copies would do */
  GNAFORGE_NO_SIZE = 12,   /* too large for this kernel */
  GNAFORGE_NO_OTHER = 13,
  GNAFORGE_FAILED = 14, /* from here on: `run` only */
  GNAFORGE_OUT_OF_MEMORY = 15
};

/* gnaforge_library.flags: built against the functional emulator; takes CPU tensors for a GPU arch. */
#define GNAFORGE_LIBRARY_EMULATED 1u

/* gnaforge_args.flags: the caller has applied the rules of gnaforge/rules.h to the call, so the entry need not. */
#define GNAFORGE_ARGS_CHECKED 1u
/* The call may run beside those before it on the same stream, back to the last one without this flag, which has
 * something to compute: none of them all reads or writes what another writes, and nothing else is put on the stream
 * between them. From version 1.1 on. */
#define GNAFORGE_ARGS_BESIDE 2u

/* A heads-last tensor [batch, tokens.., heads, channels]; its extents follow from its role and the problem. A piece of
 * extra keys has one token dim, lengths have none and no heads; the log-sum-exp has no channels. Strides in elements, 0
 * of dims that the tensor doesn't have; channels are contiguous. */
typedef struct gnaforge_tensor {
  uint32_t struct_size;
  uint32_t dtype; /* enum gnaforge_dtype */
  void* data;     /* may be null but in run: the others look at its alignment at most */
  int64_t batch_stride;
  int64_t token_stride[GNAFORGE_MAX_RANK];
  int64_t head_stride;
} gnaforge_tensor;

/* What a call asks for; arrays hold `rank` entries, outermost token dimension first, and 0 beyond. Semantics: GNA,
 * arXiv 2504.16922; along each dimension a query sees an interval of keys, and a key iff it sees it along every
 * dimension. */
typedef struct gnaforge_problem {
  uint32_t struct_size;
  int32_t rank;
  int64_t batch;
  int64_t heads;
  int64_t kv_heads; /* divides heads; query head h reads head h / (heads / kv_heads) */
  int64_t head_dim;
  int64_t value_head_dim;
  double scale;                             /* of Q K^T, before the softmax */
  int64_t tokens[GNAFORGE_MAX_RANK];        /* of the queries */
  int64_t window[GNAFORGE_MAX_RANK];        /* keys */
  int64_t stride[GNAFORGE_MAX_RANK];        /* queries that share a window */
  int64_t dilation[GNAFORGE_MAX_RANK];      /* step between the keys of a window */
  int64_t causal[GNAFORGE_MAX_RANK];        /* enum gnaforge_causal */
  int64_t edge[GNAFORGE_MAX_RANK];          /* enum gnaforge_edge */
  int64_t sink[GNAFORGE_MAX_RANK];          /* the first keys of the grid, seen beside the window */
  int64_t grid[GNAFORGE_MAX_RANK];          /* tokens that windows are laid in; neutral: kv_tokens */
  int64_t q_offset[GNAFORGE_MAX_RANK];      /* where in the grid the queries begin */
  int64_t kv_tokens[GNAFORGE_MAX_RANK];     /* of the keys; neutral: tokens */
  int64_t kv_offset[GNAFORGE_MAX_RANK];     /* where in the grid the keys begin; negative only where it wraps */
  int64_t kv_sink[GNAFORGE_MAX_RANK];       /* keys [0, kv_sink) are the grid's first, the others begin at kv_offset */
  int64_t extra_tokens[GNAFORGE_MAX_EXTRA]; /* keys of each piece, which all queries see; 0: no such piece */
} gnaforge_problem;

/* Services of the caller. parallel_for calls body on disjoint ranges that cover [begin, end), from several threads,
 * `grain` elements each at least; null, or one thread, means: serially. */
typedef struct gnaforge_host {
  uint32_t struct_size;
  int32_t threads; /* that parallel_for uses, 1 or more */
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
} gnaforge_host;

/* One call. Pointers stay the caller's. */
typedef struct gnaforge_args {
  uint32_t struct_size;
  uint32_t op;          /* enum gnaforge_op */
  uint32_t device;      /* enum gnaforge_device: where the tensors are */
  int32_t device_index; /* among the devices of that kind */
  uint64_t features;    /* GNAFORGE_FEATURE_*: what this call needs */
  uint64_t accumulate;  /* bit per role: add to what the tensor holds. Gradients only; results else are overwritten */
  uint32_t flags;       /* GNAFORGE_ARGS_* */
  uint32_t roles;       /* entries of `tensors` */
  const gnaforge_tensor* const* tensors; /* by role; null where the call has none */
  const gnaforge_problem* problem;
  const gnaforge_host* host; /* may be null: one thread */
} gnaforge_args;

/* A kernel. Facts are fixed; functions never throw and may be called from several threads at once. */
typedef struct gnaforge_entry {
  uint32_t struct_size;
  uint32_t op;            /* enum gnaforge_op */
  uint64_t features;      /* GNAFORGE_FEATURE_* that it has */
  uint32_t threads;       /* per CTA; 0 on cpu */
  uint32_t shared_memory; /* bytes per CTA; 0 on cpu */
  uint32_t device;        /* enum gnaforge_device: where it runs */
  uint32_t reserved;      /* 0 */
  const char* key;        /* names op, arch, rank, dtype, head dims and tiles; see codegen/runtime/config.py */

  /* GNAFORGE_OK if this kernel computes the call; else why not, in words for people in why[0..n). The answer depends on
   * the arguments' numbers, and of each `data` on the address modulo 64, and on nothing else. */
  int (*can_run)(const gnaforge_args* args, char* why, size_t n);

  /* Of calls that can_run has accepted, and without a check of their own: */

  /* Bytes of workspace that run needs, aligned to 256. */
  int64_t (*workspace_bytes)(const gnaforge_args* args);

  /* What run takes, in multiply-adds of the tiles that it visits, padding included, or in what takes as long: of
   * several kernels that fit the one with the least runs. */
  double (*visited_work)(const gnaforge_args* args);

  /* Runs on `stream` (a cudaStream_t; unused on cpu). GNAFORGE_OK, or why not, in words in err[0..n). */
  int (*run)(const gnaforge_args* args, void* workspace, void* stream, char* err, size_t n);

  /* Lists of calls, from version 1.1 on. Both are null where the kernel runs calls one by one only. Of one call or more
   * that can_run has accepted, all of this entry's op, on one device and with one host; none writes what another reads
   * or writes: */

  /* Bytes of workspace that run_calls needs, aligned to 256. */
  int64_t (*calls_workspace_bytes)(const gnaforge_args* const* calls, int64_t count);

  /* Computes what `run` of each call would, to the bit, in as few launches as it can and in any order. */
  int (*run_calls)(const gnaforge_args* const* calls, int64_t count, void* workspace, void* stream, char* err,
                   size_t n);
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
