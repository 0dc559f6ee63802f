#include "ampere_launch.cuh"

namespace nlora::cuda::sm80 {

template void launch_product(Stream&, const Product&);
template void launch_gradients(Stream&, const Gradient*, uint32_t);

}  // namespace nlora::cuda::sm80
