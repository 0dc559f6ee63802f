// How many bytes one processor reads of L2 in a clock cycle while all of them read.
#include <cstdint>

namespace {

constexpr uint32_t kThreads = 512, kUnroll = 8;

// Every block reads all of `data`, from a place of its own on, `passes` times, and writes how many cycles that took.
__global__ void __launch_bounds__(kThreads) read(const uint4* data, uint32_t count, uint32_t passes, int64_t* cycles,
                                                 uint32_t* sink) {
    const uint32_t step = kThreads * kUnroll, begin = uint64_t(count) * blockIdx.x / gridDim.x / step * step;
    uint32_t sum = 0;
    __syncthreads();
    const int64_t before = clock64();
    for (uint32_t pass = 0; pass < passes; ++pass) {
        for (uint32_t at = 0; at < count; at += step) {
            const uint32_t from = (begin + at) % count + threadIdx.x;
            uint4 values[kUnroll];
#pragma unroll
            for (uint32_t i = 0; i < kUnroll; ++i) {
                // Past L1, which would answer instead.
                values[i] = __ldcg(data + from + i * kThreads);
            }
#pragma unroll
            for (uint32_t i = 0; i < kUnroll; ++i) {
                sum ^= values[i].x ^ values[i].y ^ values[i].z ^ values[i].w;
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        cycles[blockIdx.x] = clock64() - before;
    }
    // Never so, but the compiler does not know.
    if (sum == 0x9E3779B9) {
        *sink = sum;
    }
}

}  // namespace

// bytes: a multiple of 64 KiB. One block a processor.
extern "C" int read_l2(const void* data, uint64_t bytes, uint32_t blocks, uint32_t passes, int64_t* cycles,
                       uint32_t* sink, void* stream) {
    read<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(data),
                                                                    uint32_t(bytes / sizeof(uint4)), passes, cycles,
                                                                    sink);
    return int(cudaGetLastError());
}
