#include "launchers.h"
#include "planned.cuh"

void nlora::cuda::product_fp16_sm90a(Stream& stream, const hopper::Product& product) {
    hopper::launch_planned<hopper::fp16>(stream, product);
}
