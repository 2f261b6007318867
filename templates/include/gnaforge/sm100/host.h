// The sm100 forward kernels' entry: sm90's, which knows the arch by its Layout. Host only.
#pragma once

#include "gnaforge/sm100/layout.h"
#include "gnaforge/sm90/host.h"

namespace gnaforge::sm100 {

template <class Config>
constexpr gnaforge_entry make_entry() {
  return sm90::make_entry<Config, Layout<Config>>();
}

}  // namespace gnaforge::sm100
