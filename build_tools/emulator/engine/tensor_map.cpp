#include "tensor_map.h"

#include <algorithm>
#include <cstring>

namespace gnaforge::emulator {

namespace {

constexpr uint32_t kAtoms32 =
    4;  // CU_TENSOR_MAP_SWIZZLE_128B_ATOM_32B; 1..3 are spans of 32, 64, 128 bytes in atoms of 16
constexpr uint64_t kMagic = 0x70616d2d61666e67;

// CUtensorMapDataType: size in bytes, and the type that reductions compute in.
struct Element {
  uint32_t size;
  Type type;
  bool floating;
};
constexpr Element kElements[] = {
    {1, Type::u8, false},  {2, Type::u16, false}, {4, Type::u32, false}, {4, Type::s32, false}, {8, Type::u64, false},
    {8, Type::s64, false}, {2, Type::f16, true},  {4, Type::f32, true},  {8, Type::f64, true},  {2, Type::bf16, true},
    {4, Type::f32, true},  {4, Type::tf32, true}, {4, Type::tf32, true},
};

// What the 128 bytes hold. The hardware's own layout is not public; programs may only pass it on.
struct Packed {
  uint64_t magic, address;
  uint64_t strides[kMaxRank - 1];
  uint32_t dims_less_one[kMaxRank];
  uint16_t box[kMaxRank];
  uint8_t element_strides[kMaxRank];
  uint8_t data_type, rank, interleave, swizzle, l2_promotion, fill_nan;
};
static_assert(sizeof(Packed) <= kTensorMapBytes, "");

}  // namespace

uint32_t TensorMap::element_size() const { return kElements[data_type].size; }
Type TensorMap::reduction_type() const { return kElements[data_type].type; }

uint32_t TensorMap::rows() const {
  uint32_t count = 1;
  for (uint32_t i = 1; i < rank; ++i) count *= extent(static_cast<int>(i));
  return count;
}

void TensorMap::each_row(const int32_t* origin,
                         const std::function<void(uint32_t, uint64_t, uint32_t, uint32_t)>& f) const {
  int64_t first = std::max<int64_t>(0, -int64_t{origin[0]});
  int64_t last = std::min<int64_t>(box[0], static_cast<int64_t>(dims[0]) - origin[0]);
  uint32_t count = rows(), at[kMaxRank] = {};
  for (uint32_t row = 0; row < count; ++row) {
    bool inside = last > first;
    int64_t offset = (origin[0] + first) * static_cast<int64_t>(element_size());
    for (uint32_t i = 1; i < rank; ++i) {
      int64_t position = int64_t{origin[i]} + int64_t{at[i]} * element_strides[i];
      inside &= position >= 0 && position < static_cast<int64_t>(dims[i]);
      offset += position * static_cast<int64_t>(strides[i]);
    }
    f(row, inside ? address + static_cast<uint64_t>(offset) : 0, static_cast<uint32_t>(first),
      inside ? static_cast<uint32_t>(last - first) : 0);
    for (uint32_t i = 1; i < rank && ++at[i] == extent(static_cast<int>(i)); ++i) at[i] = 0;
  }
}

uint32_t TensorMap::swizzled(uint32_t a) const {
  // 16-byte chunks are permuted by address bits above the span: 1, 2 or 3 bits from bit 7 up go onto bit 4 up.
  if (swizzle == kAtoms32) return a ^ ((a >> 7 & 3) << 5);
  uint32_t bits = swizzle;
  return bits == 0 ? a : a ^ ((a >> 7 & ((1u << bits) - 1)) << 4);
}

std::string encode_tensor_map(void* out, const TensorMap& map) {
  auto number = [](uint64_t n) { return std::to_string(n); };
  if (reinterpret_cast<uintptr_t>(out) % 64) return "the tensor map must be aligned to 64 bytes";
  if (map.data_type >= std::size(kElements)) return "data type " + number(map.data_type) + " is not supported";
  const Element& element = kElements[map.data_type];
  if (map.rank < 1 || map.rank > kMaxRank) return "rank " + number(map.rank) + " is not in 1..5";
  if (map.interleave != 0) return "interleaved layouts are not supported";
  if (map.swizzle > kAtoms32) return "swizzle mode " + number(map.swizzle) + " is not supported";
  if (map.address % 16) return "globalAddress " + hex(map.address) + " is not aligned to 16 bytes";
  if (map.fill_nan > 1) return "oobFill " + number(map.fill_nan) + " is unknown";
  if (map.fill_nan && !element.floating) return "NaN fill needs a floating-point type";
  if (map.l2_promotion > 3) return "l2Promotion " + number(map.l2_promotion) + " is unknown";
  for (uint32_t i = 0; i < map.rank; ++i) {
    std::string index = "[" + number(i) + "]";
    if (map.dims[i] < 1 || map.dims[i] > uint64_t{1} << 32)
      return "globalDim" + index + " = " + number(map.dims[i]) + " is not in 1..2^32";
    if (map.box[i] < 1 || map.box[i] > 256) return "boxDim" + index + " = " + number(map.box[i]) + " is not in 1..256";
    if (map.element_strides[i] < 1 || map.element_strides[i] > 8)
      return "elementStrides" + index + " = " + number(map.element_strides[i]) + " is not in 1..8";
    if (i == 0) continue;
    // Overlapping strides are allowed: programs that run on hardware make such maps.
    std::string stride = "globalStrides[" + number(i - 1) + "] = " + number(map.strides[i]);
    if (map.strides[i] % 16) return stride + " is not a multiple of 16";
    if (map.strides[i] >= uint64_t{1} << 40) return stride + " is not less than 2^40";
  }
  uint32_t inner = map.box[0] * element.size;
  if (inner % 16) return "boxDim[0] is " + number(inner) + " bytes, not a multiple of 16";
  uint32_t span = map.swizzle == kAtoms32 ? 128 : map.swizzle ? 16u << map.swizzle : 0;
  if (span && inner > span) return "boxDim[0] is " + number(inner) + " bytes, more than the swizzle's " + number(span);
  Packed packed{};
  packed.magic = kMagic;
  packed.address = map.address;
  for (uint32_t i = 0; i < map.rank; ++i) {
    if (i > 0) packed.strides[i - 1] = map.strides[i];
    packed.dims_less_one[i] = static_cast<uint32_t>(map.dims[i] - 1);
    packed.box[i] = static_cast<uint16_t>(map.box[i]);
    packed.element_strides[i] = static_cast<uint8_t>(map.element_strides[i]);
  }
  packed.data_type = static_cast<uint8_t>(map.data_type);
  packed.rank = static_cast<uint8_t>(map.rank);
  packed.swizzle = static_cast<uint8_t>(map.swizzle);
  packed.l2_promotion = static_cast<uint8_t>(map.l2_promotion);
  packed.fill_nan = static_cast<uint8_t>(map.fill_nan);
  std::memset(out, 0, kTensorMapBytes);
  std::memcpy(out, &packed, sizeof packed);
  return "";
}

TensorMap decode_tensor_map(const uint8_t* bytes) {
  Packed packed;
  std::memcpy(&packed, bytes, sizeof packed);
  if (packed.magic != kMagic) throw EmulationError("these bytes are not a tensor map");
  TensorMap map;
  map.data_type = packed.data_type;
  map.rank = packed.rank;
  map.address = packed.address;
  map.swizzle = packed.swizzle;
  map.fill_nan = packed.fill_nan;
  for (uint32_t i = 0; i < map.rank; ++i) {
    map.dims[i] = uint64_t{packed.dims_less_one[i]} + 1;
    map.strides[i] = i == 0 ? map.element_size() : packed.strides[i - 1];
    map.box[i] = packed.box[i];
    map.element_strides[i] = packed.element_strides[i];
  }
  return map;
}

}  // namespace gnaforge::emulator
