// Scalar types and state spaces of PTX, and the error that every check throws.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace gnaforge::emulator {

/// What went wrong, without its place: the scheduler adds PTX line, source line and thread.
struct EmulationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kWarpSize = 32;

// Generic addresses: windows far above any pointer of a user process, so device memory can be plain host memory.
constexpr uint64_t kSharedWindow = uint64_t{1} << 56;
constexpr uint64_t kLocalWindow = uint64_t{2} << 56;
constexpr uint64_t kParamWindow = uint64_t{3} << 56;
constexpr uint64_t kWindowMask = uint64_t{0xff} << 56;
// The system keeps the first KiB of shared memory on sm_90 and later.
constexpr uint32_t kSharedStart = 1024;

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  b128,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  f16x2,
  bf16,
  bf16x2,
  tf32,
  f32,
  f32x2,
  f64,
  e4m3,
  e5m2,
  e4m3x2,
  e5m2x2,
};

Type type_named(const std::string& name);
/// Bytes of one value; 0 for pred and none.
int size_of(Type type);
inline bool is_float(Type type) { return type >= Type::f16; }
inline bool is_signed(Type type) { return type >= Type::s8 && type <= Type::s64; }

enum class Space : uint8_t { generic, global, shared, local, param, constant };

/// "0x1f" and the like, for messages.
std::string hex(uint64_t value);

}  // namespace gnaforge::emulator
