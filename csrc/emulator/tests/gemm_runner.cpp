// The GEMM behind a C interface: compiled by a host compiler for the emulator and by nvcc for a device.
#include "../../cuda/gemm_launch.cuh"
#include "runner.h"

namespace hopper::tests {
namespace {

struct GemmCase {
    int32_t tile, is_fp16;
    uint32_t m, n, k, blocks, launches;
    const void *x, *weight, *bias;
    void* y;
    uint32_t* ticket_after;
};

template <class Tile, class T>
void run_tile(Context& context, const GemmCase& c) {
    auto matrix = [&](const void* from, size_t elements) {
        return static_cast<const T*>(from ? context.input(from, elements * 2) : nullptr);
    };
    const T* x = matrix(c.x, size_t(c.m) * c.k);
    const T* weight = matrix(c.weight, size_t(c.n) * c.k);
    const T* bias = matrix(c.bias, c.n);
    const size_t y_bytes = size_t(c.m) * c.n * 2;
    auto y = static_cast<T*>(context.output(y_bytes));
    auto ticket = static_cast<uint32_t*>(context.control(16));
    for (uint32_t launch = 0; launch < c.launches; ++launch) {
        launch_gemm<Tile, T>(context, x, weight, bias, y, ticket, c.m, c.n, c.k, c.blocks);
    }
    context.fetch(c.y, y, y_bytes);
    context.fetch(c.ticket_after, ticket, sizeof(*ticket));
}

template <class Tile>
void run_type(Context& context, const GemmCase& c) {
    c.is_fp16 ? run_tile<Tile, fp16>(context, c) : run_tile<Tile, bf16>(context, c);
}

void run_case(Context& context, const GemmCase& c) {
    switch (c.tile) {
        case 0: return run_type<GemmTile<128, 128, 4>>(context, c);
        case 1: return run_type<GemmTile<128, 256, 3>>(context, c);
        case 2: return run_type<GemmTile<128, 128, 4, 2>>(context, c);
        case 3: return run_type<GemmTile<128, 256, 3, 2>>(context, c);
        // Two stages only: slots are reused at once.
        case 4: return run_type<GemmTile<128, 64, 2, 2>>(context, c);
        default: throw std::invalid_argument("tile must be 0 to 4, got " + std::to_string(c.tile));
    }
}

}  // namespace
}  // namespace hopper::tests

extern "C" int run_gemm(const hopper::tests::GemmCase* c, const hopper::tests::Options* options,
                        hopper::tests::Outcome* outcome) {
    return hopper::tests::guarded(*options, *outcome, [&](hopper::Context& context) { run_case(context, *c); });
}
