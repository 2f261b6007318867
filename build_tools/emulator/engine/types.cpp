#include "types.h"

#include <cstdio>
#include <unordered_map>

namespace gnaforge::emulator {

namespace {
struct Named {
  const char* name;
  Type type;
  int size;
};
constexpr Named kTypes[] = {
    {"pred", Type::pred, 0},     {"b8", Type::b8, 1},         {"b16", Type::b16, 2},   {"b32", Type::b32, 4},
    {"b64", Type::b64, 8},       {"b128", Type::b128, 16},    {"u8", Type::u8, 1},     {"u16", Type::u16, 2},
    {"u32", Type::u32, 4},       {"u64", Type::u64, 8},       {"s8", Type::s8, 1},     {"s16", Type::s16, 2},
    {"s32", Type::s32, 4},       {"s64", Type::s64, 8},       {"f16", Type::f16, 2},   {"f16x2", Type::f16x2, 4},
    {"bf16", Type::bf16, 2},     {"bf16x2", Type::bf16x2, 4}, {"tf32", Type::tf32, 4}, {"f32", Type::f32, 4},
    {"f32x2", Type::f32x2, 8},   {"f64", Type::f64, 8},       {"e4m3", Type::e4m3, 1}, {"e5m2", Type::e5m2, 1},
    {"e4m3x2", Type::e4m3x2, 2}, {"e5m2x2", Type::e5m2x2, 2},
};
}  // namespace

Type type_named(const std::string& name) {
  static const auto table = [] {
    std::unordered_map<std::string, Type> map;
    for (const Named& entry : kTypes) map.emplace(entry.name, entry.type);
    return map;
  }();
  auto found = table.find(name);
  return found == table.end() ? Type::none : found->second;
}

int size_of(Type type) {
  for (const Named& entry : kTypes)
    if (entry.type == type) return entry.size;
  return 0;
}

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace gnaforge::emulator
