#include "ampere_launch.cuh"
#include "launchers.h"

namespace nlora::cuda {

void product_sm80(Stream& stream, const hopper::Product& product) {
    hopper::launch_ampere_product(stream, product);
}

void gradient_sm80(Stream& stream, const hopper::Gradient& gradient) {
    hopper::launch_ampere_gradient(stream, gradient);
}

}  // namespace nlora::cuda
