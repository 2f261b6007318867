// The rules of gnaforge/rules.h as a C function, for test_rules.py.
#include "gnaforge/rules.h"

extern "C" __attribute__((visibility("default"))) int check_problem(const gnaforge_problem* problem, char* why,
                                                                    size_t n) {
  return gnaforge::rules::problem(*problem, {why, n});
}

extern "C" __attribute__((visibility("default"))) uint64_t needed_features(const gnaforge_problem* problem) {
  return gnaforge::features_of(*problem);
}
