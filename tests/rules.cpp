// The rules of gnaforge/rules.h as a C function, for test_rules.py.
#include "gnaforge/rules.h"

extern "C" __attribute__((visibility("default"))) int check_problem(const gnaforge_problem* problem, char* why,
                                                                    size_t n) {
  return gnaforge::rules::problem(*problem, {why, n});
}

extern "C" __attribute__((visibility("default"))) uint64_t needed_features(const gnaforge_problem* problem) {
  return gnaforge::features_of(*problem);
}

extern "C" __attribute__((visibility("default"))) int check_call(const gnaforge_args* args, char* why, size_t n) {
  const gnaforge::Reason reason{why, n};
  if (const gnaforge_code code = gnaforge::rules::structs(args, reason)) return code;
  return gnaforge::rules::call(*args, reason);
}
