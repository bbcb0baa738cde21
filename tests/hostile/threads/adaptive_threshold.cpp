#include "cpu/adaptive_threshold.cpp"
#include "threads.h"

int main() {
    const Tensor score = floats({2, 70'001});  // several chunks
    return threads::at_once([&]() -> std::vector<Tensor> {
        return {fastroute::adaptive_threshold(score, 1), fastroute::adaptive_threshold(score, 8)};
    });
}
