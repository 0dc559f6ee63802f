#include "gemm_launch.cuh"

namespace nlora::cuda::sm90 {

template void launch_planned<fp16>(Stream&, const Product&);

}  // namespace nlora::cuda::sm90
