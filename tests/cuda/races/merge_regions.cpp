#include "cuda/merge_regions.cu"
#include "tensors.h"

int main() {
    // Two images of 5 x 4 tiles, of which the last are shifted inward.
    const Tensor ids = integers(40, 7, 3);
    for (const int64_t merge : {1, 2, 4, 8}) {
        const int64_t levels = fastroute::levels_of(merge);
        fastroute::merge_regions(ids, floats({3, 4 * levels * levels}), 27, 20, 8, 5, false, merge, merge > 2);
    }
}
