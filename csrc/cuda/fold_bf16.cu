#include "fold.h"

namespace fastpref::cuda {
FASTPREF_FOLD_KERNELS(bf16)
}
