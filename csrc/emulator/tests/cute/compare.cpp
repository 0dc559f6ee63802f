// The layer's formulas against CuTe's own layouts, element by element. Prints what differs; exit status 0 if nothing.
#include <cstdio>
#include <cute/tensor.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "../../../cuda/common/layout.cuh"

namespace {

namespace ours = nlora::cuda;

int differences = 0;

void expect(bool same, const char* what, int i, int j) {
  if (!same && differences++ < 20) {
    std::printf("%s differs at %d, %d\n", what, i, j);
  }
}

// CuTe numbers the accumulators (thread, value) -> column-major index in 64 × N.
template <int N>
void compare_accumulators() {
  const cute::SM90::GMMA::CLayout_64xN<N> layout;
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < N / 2; ++i) {
      const int index = layout(thread, i);
      const auto row = int(ours::accumulator_row(thread / 32, thread % 32, i));
      const auto column = int(ours::accumulator_column(thread % 32, i));
      expect(index % 64 == row, "accumulator row", thread, i);
      expect(index / 64 == column, "accumulator column", thread, i);
    }
  }
}

template <int Bits>
void compare_swizzle(ours::Swizzle mode) {
  const cute::Swizzle<Bits, 4, 3> swizzle;
  for (int address = 0; address < 4096; ++address) {
    expect(swizzle(address) == int(ours::swizzled(address, mode)), "swizzle", Bits, address);
  }
}

using Element = cute::bfloat16_t;

alignas(1024) uint8_t memory[16384];

// A 128 × 64 tile in `memory`: CuTe swizzles the addresses of its elements.
template <class Atom, class Order>
auto tile_of(Atom atom, Order order) {
  const auto layout = cute::tile_to_shape(atom, cute::Shape<cute::_128, cute::_64>{}, order);
  return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(memory)), layout);
}

template <class Tensor, class Linear>
void compare_tile(const Tensor& tile, Linear linear, const char* what) {
  for (int row = 0; row < 128; ++row) {
    for (int k = 0; k < 64; ++k) {
      const auto offset = reinterpret_cast<const uint8_t*>(&tile(row, k)) - memory;
      expect(uint32_t(offset) == ours::swizzled(linear(row, k), ours::Swizzle::B128), what, row, k);
    }
  }
}

void compare_descriptor(uint32_t start, uint32_t leading, uint32_t stride, cute::SM90::GMMA::LayoutType type,
                        ours::Swizzle mode) {
  cute::GmmaDescriptor expected;
  expected.bitfield.start_address_ = uint16_t((start & 0x3FFFF) >> 4);
  expected.bitfield.leading_byte_offset_ = uint16_t(leading >> 4);
  expected.bitfield.stride_byte_offset_ = uint16_t(stride >> 4);
  expected.bitfield.base_offset_ = 0;
  expected.bitfield.layout_type_ = uint8_t(type);
  const uint64_t made = ours::matrix_descriptor(start, leading, stride, mode);
  expect(uint64_t(expected) == made, "descriptor", int(start), int(stride));
}

// The strides that CuTe itself derives for a tile.
template <cute::SM90::GMMA::Major MajorMode, class Tensor>
void compare_derived_descriptor(const Tensor& tile, uint64_t made, const char* what) {
  const auto slice = cute::local_tile(tile, cute::Shape<cute::_128, cute::_16>{}, cute::make_coord(0, 0));
  const uint64_t derived = cute::SM90::GMMA::make_gmma_desc<MajorMode>(slice);
  // The start address is this process's; a swizzled K-major operand has no use for the leading offset.
  const uint64_t mask = MajorMode == cute::SM90::GMMA::Major::MN ? ~0ull << 16 : ~0ull << 32;
  expect((derived & mask) == (made & mask), what, 0, 0);
}

}  // namespace

int main() {
  using namespace cute::SM90::GMMA;
  compare_accumulators<16>();
  compare_accumulators<64>();
  compare_accumulators<128>();
  compare_accumulators<256>();
  compare_swizzle<3>(ours::Swizzle::B128);
  compare_swizzle<2>(ours::Swizzle::B64);
  compare_swizzle<1>(ours::Swizzle::B32);
  compare_swizzle<0>(ours::Swizzle::None);
  // As one TMA box leaves it, and as two boxes of 64 elements by 64 k, one after another.
  const auto k_major = tile_of(Layout_K_SW128_Atom<Element>{}, cute::Step<cute::_1, cute::_2>{});
  const auto mn_major = tile_of(Layout_MN_SW128_Atom<Element>{}, cute::Step<cute::_2, cute::_1>{});
  compare_tile(k_major, [](int row, int k) { return row * 128 + k * 2; }, "K-major tile");
  compare_tile(mn_major, [](int row, int k) { return row / 64 * 8192 + k * 128 + row % 64 * 2; }, "MN-major tile");
  compare_derived_descriptor<Major::K>(k_major, ours::k_major_descriptor(0), "derived K-major descriptor");
  compare_derived_descriptor<Major::MN>(mn_major, ours::mn_major_descriptor(0, 64), "derived MN-major descriptor");
  compare_descriptor(0x1C400, 16, 1024, LayoutType::B128, ours::Swizzle::B128);
  compare_descriptor(0x38000, 8192, 512, LayoutType::B64, ours::Swizzle::B64);
  compare_descriptor(0x400, 2048, 256, LayoutType::B32, ours::Swizzle::B32);
  compare_descriptor(0x10, 128, 64, LayoutType::INTERLEAVE, ours::Swizzle::None);
  return differences != 0;
}
