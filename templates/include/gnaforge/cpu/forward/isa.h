// The kernel for one instruction set, which kernel.h has selected. No include guard.
#include "gnaforge/cpu/vector.h"
#include "gnaforge/cpu/convert.h"
#include "gnaforge/cpu/microkernel.h"
#include "gnaforge/cpu/forward/tile.h"
#undef GNAFORGE_ISA
#undef GNAFORGE_VECTOR_BYTES
