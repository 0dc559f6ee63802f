#include "gemm_launch.cuh"

namespace nlora::cuda::sm90 {

template void launch_planned<bf16>(Stream&, const Product*, uint32_t);

}  // namespace nlora::cuda::sm90
