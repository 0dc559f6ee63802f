// The launches of the extension. Each is compiled in a file of its own name, for the architectures that setup.py reads
// from the end of that name.
#pragma once

#include "context.cuh"
#include "gradient.h"
#include "nystrom.h"
#include "product.h"

namespace nlora::cuda {

using hopper::Stream;

void product_bf16_sm90a(Stream& stream, const hopper::Product& product);
void product_fp16_sm90a(Stream& stream, const hopper::Product& product);
void gradients_sm90a(Stream& stream, const hopper::Gradient* gradients, uint32_t count);

void product_sm80(Stream& stream, const hopper::Product& product);
void gradients_sm80(Stream& stream, const hopper::Gradient* gradients, uint32_t count);

void fold(Stream& stream, const Matrix& B, const Matrix& core, float scaling, const Matrix& out);
void finishes(Stream& stream, const hopper::Finish* finishes, uint32_t count);
void lora2_core(Stream& stream, const Matrix& u, const Matrix& E, const Matrix& U, const Matrix& mask,
                const Matrix& core);
void lora2_core_backward(Stream& stream, const Matrix& dcore, const Matrix& u, const Matrix& E, const Matrix& U,
                         const Matrix& mask, const Matrix& du, const Matrix& dE, const Matrix& dU);
void gather(Stream& stream, const hopper::Gather& gather);
void residual(Stream& stream, const hopper::Residual& residual);

}  // namespace nlora::cuda
