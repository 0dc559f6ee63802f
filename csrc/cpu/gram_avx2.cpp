namespace nlora::cpu {
namespace {
constexpr int kWidth = 8;
}  // namespace
}  // namespace nlora::cpu

#include "cpu/gram.inl"

namespace nlora::cpu {
const GramKernels& avx2_gram() { return kKernels; }
}  // namespace nlora::cpu
