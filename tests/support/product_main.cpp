// The product of every micro-kernel of this processor against float64; with a name, of that kernel, which
// must be there.
#include "product_check.h"

using namespace fastpref;

int main(int count, char** arguments) {
    int wrong = 0;
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
        bool found = count < 2;
        for (auto* kernel : micro_kernels(dtype))
            if (count < 2 || std::strcmp(kernel->name, arguments[1]) == 0) {
                found = true;
                wrong += !product_check::is_right(*kernel, dtype);
            }
        wrong += !found;
    }
    return wrong;
}
