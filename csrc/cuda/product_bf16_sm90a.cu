#include "launchers.h"
#include "planned.cuh"

void nlora::cuda::product_bf16_sm90a(Stream& stream, const hopper::Product& product) {
    hopper::launch_planned<hopper::bf16>(stream, product);
}
