#include "gradient.cuh"
#include "launchers.h"

namespace nlora::cuda {

void gradients_sm90a(Stream& stream, const hopper::Gradient* gradients, uint32_t count) {
    hopper::launch_gradients(stream, gradients, count);
}

}  // namespace nlora::cuda
