// Registers and tiles of AVX-512, as kernels.inl asks for them.

namespace nlora::cpu {
namespace {
constexpr int kWidth = 16;
constexpr int kTileRows = 8, kTileVectors = 3;
constexpr int kUnrolled = 8;
constexpr int kDotRows = 6, kDotCols = 4;
}  // namespace
}  // namespace nlora::cpu
