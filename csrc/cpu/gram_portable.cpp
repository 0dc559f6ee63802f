namespace nlora::cpu {
namespace {
constexpr int kWidth = 4;
}  // namespace
}  // namespace nlora::cpu

#include "cpu/gram.inl"

namespace nlora::cpu {
const GramKernels& portable_gram() { return kKernels; }
}  // namespace nlora::cpu
