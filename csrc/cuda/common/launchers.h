// The launches of the extension, which launch.cu knows by their declarations alone. Each .cu file holds nothing but
// instantiations for a Stream, and is compiled for the architectures of its folder.
#pragma once

#include "context.cuh"
#include "gradient.h"
#include "nystrom.h"
#include "product.h"

namespace nlora::cuda {

template <class Context>
void launch_folds(Context& context, const Fold* folds, uint32_t count);
template <class Context>
void launch_finishes(Context& context, const Finish* finishes, uint32_t count);
template <class Context>
void launch_core(Context& context, const Matrix& u, const Matrix& E, const Matrix& U, const Matrix& mask,
                 const Matrix& core);
template <class Context>
void launch_core_backward(Context& context, const Matrix& dcore, const Matrix& u, const Matrix& E, const Matrix& U,
                          const Matrix& mask, const Matrix& du, const Matrix& dE, const Matrix& dU);
template <class Context>
void launch_gather(Context& context, const Gather& gather);
template <class Context>
void launch_residual(Context& context, const Residual& residual);

namespace sm80 {

template <class Context>
void launch_products(Context& context, const Product* products, uint32_t count);
template <class Context>
void launch_gradients(Context& context, const Gradient* gradients, uint32_t count);

}  // namespace sm80

namespace sm90 {

template <class T, class Context>
void launch_planned(Context& context, const Product* products, uint32_t count);
template <class Context>
void launch_gradients(Context& context, const Gradient* gradients, uint32_t count);

}  // namespace sm90
}  // namespace nlora::cuda
