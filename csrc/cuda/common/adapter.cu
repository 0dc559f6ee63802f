#include "core.cuh"
#include "finish.cuh"
#include "fold.cuh"

namespace nlora::cuda {

template void launch_folds(Stream&, const Fold*, uint32_t);
template void launch_finishes(Stream&, const Finish*, uint32_t);
template void launch_core(Stream&, const Matrix&, const Matrix&, const Matrix&, const Matrix&, const Matrix&);
template void launch_core_backward(Stream&, const Matrix&, const Matrix&, const Matrix&, const Matrix&, const Matrix&,
                                   const Matrix&, const Matrix&, const Matrix&);

}  // namespace nlora::cuda
