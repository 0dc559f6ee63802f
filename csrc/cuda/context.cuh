// Memory, tensor maps and launches: what host code needs to run a kernel on a device or, under a host compiler, on
// the emulator.
#pragma once

#include "hopper.cuh"

#ifndef __CUDACC__

#include "../emulator/context.h"

#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace hopper {

inline void check_cuda(cudaError_t status, const char* call) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(status));
    }
}

struct LaunchShape {
    uint32_t grid, block, cluster, shared_bytes, registers;
};

// Launches on one stream of the current device.
class Stream {
public:
    explicit Stream(cudaStream_t stream = nullptr) : stream_(stream) {}

    uint32_t processors() const {
        return uint32_t(attribute(cudaDevAttrMultiProcessorCount));
    }

    // 90 for compute capability 9.0.
    int architecture() const {
        return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    }

    template <class Parameters>
    void launch(const LaunchShape& shape, void (*kernel)(Parameters), const Parameters& parameters) {
        // The layer rounds the start of shared memory up to its alignment.
        const uint32_t shared_bytes = shape.shared_bytes + kSharedAlignment;
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
                   "cudaFuncSetAttribute");
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {shape.cluster, 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = shape.grid;
        config.blockDim = shape.block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream_;
        config.attrs = &cluster;
        // NOTE: devices before sm_90 know no clusters, not even of one.
        config.numAttrs = shape.cluster > 1;
        check_cuda(cudaLaunchKernelEx(&config, kernel, parameters), "cudaLaunchKernelEx");
    }

private:
    static int attribute(cudaDeviceAttr name) {
        int device = 0, value = 0;
        check_cuda(cudaGetDevice(&device), "cudaGetDevice");
        check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
        return value;
    }

    cudaStream_t stream_;
};

// The same with memory of its own, for tests.
class Context : public Stream {
public:
    Context() = default;
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    ~Context() {
        for (void* memory : allocated_) {
            cudaFree(memory);
        }
    }

    void* input(const void* from, size_t bytes) {
        void* data = allocate(bytes);
        check_cuda(cudaMemcpy(data, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
        return data;
    }

    void* inout(const void* from, size_t bytes) {
        return input(from, bytes);
    }

    void* output(size_t bytes) {
        void* data = allocate(bytes);
        check_cuda(cudaMemset(data, 0xFF, bytes), "cudaMemset");
        return data;
    }

    void* control(size_t bytes) {
        void* data = allocate(bytes);
        check_cuda(cudaMemset(data, 0, bytes), "cudaMemset");
        return data;
    }

    void fetch(void* to, const void* from, size_t bytes) {
        check_cuda(cudaDeviceSynchronize(), "kernel");
        check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    }

    std::string name() const {
        cudaDeviceProp properties;
        check_cuda(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
        return properties.name;
    }

private:
    void* allocate(size_t bytes) {
        void* data = nullptr;
        check_cuda(cudaMalloc(&data, bytes), "cudaMalloc");
        allocated_.push_back(data);
        return data;
    }

    std::vector<void*> allocated_;
};

// Map of a row-major matrix of 16-bit elements; reads outside it give 0, writes outside it are dropped.
inline TensorMap tensor_map(const void* data, uint64_t rows, uint64_t columns, uint64_t row_bytes, uint32_t box_rows,
                            uint32_t box_columns, Swizzle swizzle) {
    // Taken from the driver at run time, so that nothing links against it.
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                    &found),
                   "cudaGetDriverEntryPointByVersion");
        if (found != cudaDriverEntryPointSuccess) {
            throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
        }
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    const CUtensorMapSwizzle modes[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                        CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
    const cuuint64_t sizes[] = {columns, rows};
    const cuuint64_t strides[] = {row_bytes};
    const cuuint32_t box[] = {box_columns, box_rows};
    const cuuint32_t steps[] = {1, 1};
    TensorMap map;
    // NOTE: all 16-bit formats move alike; only zero fill is asked for, which is the same bits in each.
    const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides,
                                   box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, modes[uint32_t(swizzle)],
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled failed with status " + std::to_string(int(status)) +
                                 " for a matrix of " + std::to_string(rows) + " × " + std::to_string(columns));
    }
    return map;
}

}  // namespace hopper

#endif
