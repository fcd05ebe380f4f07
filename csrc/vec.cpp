// The bounds of exp, in a file where nothing uses them: see vec.h.
#include "vec.h"

namespace fastpref {

extern const float EXP_LOW = -87.33f, EXP_HIGH = 88.7f;

}  // namespace fastpref
