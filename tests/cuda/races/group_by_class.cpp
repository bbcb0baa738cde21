#include "cuda/group_by_class.cu"
#include "tensors.h"

int main() {
    // Several stretches, a last one that is not full, and more counts than one turn of the scan.
    fastroute::group_by_class(integers(1500, 7, 11), 11);
    fastroute::group_by_class(integers(700, 3, 900), 900);
}
