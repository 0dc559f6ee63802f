#include "gradient.cuh"

namespace nlora::cuda::sm90 {

template void launch_gradients(Stream&, const Gradient*, uint32_t);

}  // namespace nlora::cuda::sm90
