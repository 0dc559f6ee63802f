#include "core.cuh"
#include "finish.cuh"
#include "fold.cuh"
#include "gather.cuh"
#include "launchers.h"
#include "residual.cuh"

namespace nlora::cuda {

void fold(Stream& stream, const Matrix& B, const Matrix& core, float scaling, const Matrix& out) {
    hopper::launch_fold(stream, B, core, scaling, out);
}

void finishes(Stream& stream, const hopper::Finish* finishes, uint32_t count) {
    hopper::launch_finishes(stream, finishes, count);
}

void lora2_core(Stream& stream, const Matrix& u, const Matrix& E, const Matrix& U, const Matrix& mask,
                const Matrix& core) {
    hopper::launch_core(stream, u, E, U, mask, core);
}

void lora2_core_backward(Stream& stream, const Matrix& dcore, const Matrix& u, const Matrix& E, const Matrix& U,
                         const Matrix& mask, const Matrix& du, const Matrix& dE, const Matrix& dU) {
    hopper::launch_core_backward(stream, dcore, u, E, U, mask, du, dE, dU);
}

void gather(Stream& stream, const hopper::Gather& gather) {
    hopper::launch_gather(stream, gather);
}

void residual(Stream& stream, const hopper::Residual& residual) {
    hopper::launch_residual(stream, residual);
}

}  // namespace nlora::cuda
