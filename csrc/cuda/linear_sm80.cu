#include "ampere_launch.cuh"
#include "launchers.h"

namespace nlora::cuda {

void product_sm80(Stream& stream, const hopper::Product& product) {
    hopper::launch_ampere_product(stream, product);
}

void gradients_sm80(Stream& stream, const hopper::Gradient* gradients, uint32_t count) {
    hopper::launch_ampere_gradients(stream, gradients, count);
}

}  // namespace nlora::cuda
