#include "gather.cuh"
#include "residual.cuh"

namespace nlora::cuda {

template void launch_gather(Stream&, const Gather&);
template void launch_residual(Stream&, const Residual&);

}  // namespace nlora::cuda
