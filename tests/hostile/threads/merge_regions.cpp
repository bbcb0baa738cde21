#include "cpu/merge_regions.cpp"
#include "threads.h"

int main() {
    // Two images of 5 x 4 tiles, of which the last are shifted inward.
    const Tensor ids = integers(40, 7, 3), costs = floats({3, 36});
    return threads::at_once([&]() -> std::vector<Tensor> {
        const auto [executed, region, group] = fastroute::merge_regions(ids, costs, 27, 20, 8, 5, false, 4, true);
        return {executed, region, group};
    });
}
