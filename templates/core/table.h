// The process's table of kernels: loads kernel libraries, finds the kernel for a call. No torch.
#pragma once

#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "gnaforge/abi.h"

namespace gnaforge {

struct Kernel {
  const gnaforge_entry* entry;
  std::string key;
  std::string origin;  ///< Path of the library that brought it.
  bool emulated;       ///< A GPU kernel that takes CPU tensors, by way of the emulator.

  uint32_t tensor_device() const { return emulated ? static_cast<uint32_t>(GNAFORGE_CPU) : entry->device; }
};

using KernelMap = std::map<std::string, Kernel>;

inline std::string version_text(uint32_t abi) {
  return std::to_string(abi >> 16) + "." + std::to_string(abi & 0xffff);
}

/// Throws unless the file is a whole ELF library: the loader maps a truncated one without looking, and the process
/// dies of SIGBUS at the first missing page.
inline void check_whole(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + ": can't be opened: " + std::strerror(errno));
  const auto size = static_cast<uint64_t>(file.tellg());
  Elf64_Ehdr header{};
  file.seekg(0);
  file.read(reinterpret_cast<char*>(&header), sizeof(header));
  if (!file || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64)
    throw std::runtime_error(path + ": not a shared library (no 64-bit ELF header in its " + std::to_string(size) +
                             " bytes)");
  const auto need = [&](uint64_t end) {
    if (end > size)
      throw std::runtime_error(path + ": truncated: it needs " + std::to_string(end) + " bytes and has " +
                               std::to_string(size) + "; rebuild it");
  };
  need(header.e_shoff + uint64_t{header.e_shentsize} * header.e_shnum);
  for (int i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment{};
    file.seekg(static_cast<std::streamoff>(header.e_phoff + uint64_t{header.e_phentsize} * static_cast<uint64_t>(i)));
    file.read(reinterpret_cast<char*>(&segment), sizeof(segment));
    if (!file) need(size + 1);
    need(segment.p_offset + segment.p_filesz);
  }
}

/// Kernels by key. Loading copies the map, so a reader keeps the version that it took without a lock.
class Table {
 public:
  std::shared_ptr<const KernelMap> kernels() const { return std::atomic_load(&kernels_); }

  /// Grows by one with every change of the table; what was looked up under an older number may be stale.
  uint64_t generation() const { return generation_.load(std::memory_order_acquire); }

  /// Loads a kernel library and adds its kernels. A key that is there already keeps its first kernel.
  /// Returns how many kernels are new. Throws std::runtime_error.
  int load(const std::string& path) {
    check_whole(path);
    // NOW, so that a damaged library fails here and not at the first call.
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw std::runtime_error("can't load the kernel library: " + std::string(dlerror()));
    auto* library_v1 = reinterpret_cast<const gnaforge_library* (*)()>(dlsym(handle, "gnaforge_library_v1"));
    if (!library_v1) {
      dlclose(handle);
      throw std::runtime_error(path + ": not a gnaforge kernel library of ABI major version " +
                               std::to_string(GNAFORGE_ABI_MAJOR) + " (it exports no gnaforge_library_v1); rebuild it");
    }
    return add(*library_v1(), path);
  }

  int add(const gnaforge_library& library, const std::string& origin) {
    if (!GNAFORGE_HAS(&library, entries) || library.abi >> 16 != GNAFORGE_ABI_MAJOR)
      throw std::runtime_error(origin + ": built for gnaforge ABI " + version_text(library.abi) +
                               ", this core speaks " + version_text(GNAFORGE_ABI_VERSION) + "; rebuild the library");
    const std::lock_guard<std::mutex> lock(mutex_);
    auto next = std::make_shared<KernelMap>(*kernels());
    int added = 0;
    for (uint32_t i = 0; i < library.count; ++i) {
      const gnaforge_entry* entry = library.entries[i];
      if (!GNAFORGE_HAS(entry, run)) throw std::runtime_error(origin + ": holds an incomplete kernel entry");
      const bool emulated = library.flags & GNAFORGE_LIBRARY_EMULATED;
      added += next->emplace(entry->key, Kernel{entry, entry->key, origin, emulated}).second;
    }
    if (added) {
      std::atomic_store(&kernels_, std::shared_ptr<const KernelMap>(std::move(next)));
      generation_.fetch_add(1, std::memory_order_release);
    }
    return added;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<const KernelMap> kernels_ = std::make_shared<const KernelMap>();
  std::atomic<uint64_t> generation_{1};
};

/// What a lookup yields: kernels live as long as the process, so the pointer stays good.
struct Choice {
  const gnaforge_entry* entry;
  int64_t workspace_bytes;
};

inline std::string describe(const gnaforge_args& args) {
  const gnaforge_problem& p = *args.problem;
  const auto list = [&p](const int64_t* values) {
    std::string text;
    for (int d = 0; d < p.rank; ++d) text += (d ? "x" : "") + std::to_string(values[d]);
    return text;
  };
  static constexpr const char* dtypes[] = {"unknown dtype", "fp32", "bf16", "fp16"};
  std::string text = "rank " + std::to_string(p.rank) + ", " + dtypes[args.q->dtype] + ", head_dim " +
                     std::to_string(p.head_dim);
  if (p.value_head_dim != p.head_dim) text += " (value " + std::to_string(p.value_head_dim) + ")";
  text += ", heads " + std::to_string(p.heads);
  if (p.kv_heads != p.heads) text += " (kv " + std::to_string(p.kv_heads) + ")";
  text += ", tokens " + list(p.tokens) + ", window " + list(p.window) + ", stride " + list(p.stride) + ", dilation " +
          list(p.dilation) + ", causal " + list(p.causal);
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
  const auto most = [&p](const int64_t* values) { return *std::max_element(values, values + p.rank); };
  static constexpr const char* dtypes[] = {"", "fp32", "bf16", "fp16"};
  std::string text = "gnaforge.register(rank=" + std::to_string(p.rank) + ", head_dim=" + std::to_string(p.head_dim);
  if (p.value_head_dim != p.head_dim) text += ", value_head_dim=" + std::to_string(p.value_head_dim);
  text += std::string(", dtype=\"") + dtypes[args.q->dtype] + "\"";
  if (args.device == GNAFORGE_CPU) text += ", arch=\"cpu\"";
  text += extents("tokens", p.tokens) + extents("window", p.window);
  if (most(p.stride) > 1) text += extents("stride", p.stride);
  if (most(p.dilation) > 1) text += extents("dilation", p.dilation);
  if (most(p.causal) > 0) text += field("causal", [&p](int d) { return p.causal[d] ? "True" : "False"; });
  text += ", heads=" + std::to_string(p.heads);
  if (p.kv_heads != p.heads) text += ", kv_heads=" + std::to_string(p.kv_heads);
  if (p.batch != 1) text += ", batch=" + std::to_string(p.batch);
  return text + ")";
}

/// True if the kernel computes the call; else `why` says why not.
inline bool can_run(const Kernel& kernel, const gnaforge_args& args, std::string& why) {
  if (kernel.tensor_device() != args.device) {
    why = args.device == GNAFORGE_CUDA ? "takes CPU tensors" : "takes CUDA tensors";
    return false;
  }
  char text[512] = "";
  if (kernel.entry->can_run(&args, text, sizeof(text))) return true;
  why = text;
  return false;
}

/// The kernel named `key`, or for an empty key the one with the least work among those that can run.
/// Emulated kernels run only when named. Throws std::runtime_error that lists each kernel's reason for refusing.
inline Choice choose(const Table& table, const std::string& key, const gnaforge_args& args) {
  const auto kernels = table.kernels();
  std::string why;
  if (!key.empty()) {
    const auto found = kernels->find(key);
    if (found == kernels->end())
      throw std::runtime_error("gnaforge: no kernel " + key +
                               " is loaded or in the cache\nregister it with: gnaforge.register(\"" + key + "\")");
    if (!can_run(found->second, args, why))
      throw std::runtime_error("gnaforge: no kernel fits: " + key + " was asked for and can't run this problem (" +
                               describe(args) + "): " + why);
    return {found->second.entry, found->second.entry->workspace_bytes(&args)};
  }
  const gnaforge_entry* best = nullptr;
  double least = 0;
  std::string refusals;
  for (const auto& [name, kernel] : *kernels) {
    if (kernel.emulated) {
      why = "emulated, runs only when named";
    } else if (can_run(kernel, args, why)) {
      const double work = kernel.entry->visited_work(&args);
      if (!best || work < least) {
        best = kernel.entry;
        least = work;
      }
      continue;
    }
    refusals += "\n  " + name + ": " + why;
  }
  if (!best)
    throw std::runtime_error("gnaforge: no kernel fits this problem: " + describe(args) +
                             (refusals.empty() ? "\n  no kernel is loaded" : refusals) +
                             "\nregister one with: " + register_call(args));
  return {best, best->workspace_bytes(&args)};
}

/// All that a choice can depend on, as numbers: the memo's key. Kernels see no more of a call than this, the
/// pointers' alignment included.
struct Signature {
  static constexpr int size = 64;
  int64_t value[size] = {};
  int used = 0;

  Signature(uint64_t generation, const gnaforge_args& args) {
    const gnaforge_problem& p = *args.problem;
    push(static_cast<int64_t>(generation));
    push(args.device);
    push(args.device_index);
    push(static_cast<int64_t>(args.features));
    push(p.rank);
    push(p.batch);
    push(p.heads);
    push(p.kv_heads);
    push(p.head_dim);
    push(p.value_head_dim);
    int64_t scale;
    static_assert(sizeof(scale) == sizeof(p.scale), "its bits are a number");
    std::memcpy(&scale, &p.scale, sizeof(scale));
    push(scale);
    for (int d = 0; d < p.rank; ++d) {
      push(p.tokens[d]);
      push(p.window[d]);
      push(p.stride[d]);
      push(p.dilation[d]);
      push(p.causal[d]);
    }
    for (const gnaforge_tensor* tensor : {args.q, args.k, args.v}) {
      push(tensor->dtype);
      push(static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor->data) % 128));
      push(tensor->batch_stride);
      push(tensor->head_stride);
      for (int d = 0; d < p.rank; ++d) push(tensor->token_stride[d]);
    }
    push(args.host->threads);
  }

  bool operator==(const Signature& other) const {
    return used == other.used && std::memcmp(value, other.value, sizeof(int64_t) * static_cast<size_t>(used)) == 0;
  }

  size_t slot(size_t slots) const {
    uint64_t hash = 0x9e3779b97f4a7c15u;
    for (int i = 0; i < used; ++i) hash = (hash ^ static_cast<uint64_t>(value[i])) * 0x100000001b3u;
    return static_cast<size_t>((hash ^ hash >> 32) % slots);
  }

 private:
  void push(int64_t number) { value[used++] = number; }
};

/// `choose` with a memo per thread, so that a repeated call costs one comparison.
inline Choice choose_memoised(const Table& table, const std::string& key, const gnaforge_args& args) {
  struct Slot {
    Signature signature;
    std::string key;
    Choice choice;
  };
  constexpr size_t slots = 128;
  thread_local std::unique_ptr<Slot> memo[slots];
  const Signature signature(table.generation(), args);
  std::unique_ptr<Slot>& slot = memo[signature.slot(slots)];
  if (!slot || !(slot->signature == signature) || slot->key != key)
    slot.reset(new Slot{signature, key, choose(table, key, args)});
  return slot->choice;
}

}  // namespace gnaforge
