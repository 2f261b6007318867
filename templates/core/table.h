// The process's table of kernels: loads kernel libraries. No torch.
#pragma once

#include <dlfcn.h>
#include <elf.h>

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
#include "gnaforge/names.h"

namespace gnaforge {

struct Kernel {
  const gnaforge_entry* entry;
  std::string key;
  std::string origin;  ///< Path of the library that brought it.
  bool emulated;       ///< A GPU kernel that takes CPU tensors, by way of the emulator.

  uint32_t tensor_device() const { return emulated ? static_cast<uint32_t>(GNAFORGE_CPU) : entry->device; }
};

using KernelMap = std::map<std::string, Kernel>;

inline std::string version_text(uint32_t abi) { return std::to_string(abi >> 16) + "." + std::to_string(abi & 0xffff); }

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
    const gnaforge_library* const library = library_v1();
    if (!library) throw std::runtime_error(path + ": its table of kernels is incomplete; rebuild the library");
    return add(*library, path);
  }

  int add(const gnaforge_library& library, const std::string& origin) {
    if (!GNAFORGE_HAS(&library, entries) || (library.count > 0 && !library.entries))
      throw std::runtime_error(origin + ": its table of kernels is incomplete; rebuild the library");
    if (library.abi >> 16 != GNAFORGE_ABI_MAJOR)
      throw std::runtime_error(origin + ": built for gnaforge ABI " + version_text(library.abi) +
                               ", this core speaks " + version_text(GNAFORGE_ABI_VERSION) + "; rebuild the library");
    const std::lock_guard<std::mutex> lock(mutex_);
    auto next = std::make_shared<KernelMap>(*kernels());
    int added = 0;
    for (uint32_t i = 0; i < library.count; ++i) {
      const gnaforge_entry* entry = library.entries[i];
      if (!entry || !GNAFORGE_HAS(entry, run) || !entry->key || !entry->can_run || !entry->workspace_bytes ||
          !entry->visited_work || !entry->run)
        throw std::runtime_error(origin + ": holds an incomplete kernel entry; rebuild the library");
      const char* const op = op_name(entry->op);
      if (op && std::string(entry->key).rfind(std::string(op) + "-", 0) != 0)
        throw std::runtime_error(origin + ": the kernel " + entry->key + " says that it computes " + op +
                                 ", which its key doesn't; rebuild the library");
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

}  // namespace gnaforge
