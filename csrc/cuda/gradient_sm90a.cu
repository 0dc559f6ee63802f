#include "gradient.cuh"
#include "launchers.h"

namespace nlora::cuda {

void gradient_sm90a(Stream& stream, const hopper::Gradient& gradient) {
    hopper::launch_gradient(stream, gradient);
}

}  // namespace nlora::cuda
