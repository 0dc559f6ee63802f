#include "ampere_launch.cuh"

namespace nlora::cuda::sm80 {

template void launch_products(Stream&, const Product*, uint32_t);
template void launch_gradients(Stream&, const Gradient*, uint32_t);

}  // namespace nlora::cuda::sm80
