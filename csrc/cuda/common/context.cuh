// Memory, tensor maps and launches: what host code needs to run a kernel on a device or, under a host compiler, on
// the emulator.
#pragma once

#include "layer.cuh"

#ifndef __CUDACC__

#include "../../emulator/context.h"

#else

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "current.h"
#include "states.h"

namespace nlora::cuda {

#ifdef NLORA_BOUND_SPINS

// What the waits that gave up noted: memory of the host, which outlives the trap. The process ends with saying it,
// whoever met the error.
inline std::vector<SpinRecord>& spin_records() {
  static auto& records = *new std::vector<SpinRecord>(kSpinRecords);
  return records;
}

inline std::string spin_report() {
  std::string text;
  for (const SpinRecord& record : spin_records()) {
    text += record.kind ? "\n  " + record.text() : "";
  }
  return text;
}

#else

inline std::string spin_report() { return ""; }

#endif

inline void check_cuda(cudaError_t status, const char* call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(status) + spin_report());
  }
}

// Runs body(a stream of its own), which no capture notices and which waits for nothing else, to its end.
template <class Body>
void aside(const char* what, Body body) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  cudaStream_t stream = nullptr;
  cudaError_t status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (status == cudaSuccess) {
    status = body(stream);
  }
  if (status == cudaSuccess) {
    status = cudaStreamSynchronize(stream);
  }
  if (stream) {
    cudaStreamDestroy(stream);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  check_cuda(status, what);
}

// The driver, taken at run time so that nothing links against it.
class Driver {
 public:
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  const decltype(&cuTensorMapEncodeTiled) encode_tiled =
      found<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");

  void check(CUresult status, const std::string& call) const {
    if (status != CUDA_SUCCESS) {
      const char* text = nullptr;
      error_string_(status, &text);
      throw std::runtime_error(call + " failed: " + (text ? text : "status " + std::to_string(int(status))));
    }
  }

  CUcontext current() const {
    CUcontext context = nullptr;
    check(get_current_(&context), "cuCtxGetCurrent");
    return context;
  }
  void push(CUcontext context) const { check(push_(context), "cuCtxPushCurrent"); }
  void pop() const {
    CUcontext context;
    pop_(&context);
  }

  // Address of a variable in the code that a kernel is part of, null if it has none of that name.
  void* variable(const void* kernel, const char* name) const {
    cudaFunction_t function = nullptr;
    check_cuda(cudaGetFuncBySymbol(&function, kernel), "cudaGetFuncBySymbol");
    CUmodule module = nullptr;
    check(get_module_(&module, function), "cuFuncGetModule");
    CUdeviceptr address = 0;
    const CUresult status = get_global_(&address, nullptr, module, name);
    if (status != CUDA_ERROR_NOT_FOUND) {
      check(status, "cuModuleGetGlobal");
    }
    return reinterpret_cast<void*>(address);
  }

  // What never changes of a device. Its context is the one that the runtime uses: once used, it is kept.
  struct Device {
    CUcontext context = nullptr;
    int architecture = 0;   // 90 for compute capability 9.0
    uint32_t processors = 0;
  };
  const Device& device(int index) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Device& device = devices_[index];
    if (!device.context) {
      CUdevice found = 0;
      check(get_device_(&found, index), "cuDeviceGet");
      device.processors = uint32_t(attribute(cudaDevAttrMultiProcessorCount, index));
      device.architecture = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                            attribute(cudaDevAttrComputeCapabilityMinor, index);
      check(retain_(&device.context, found), "cuDevicePrimaryCtxRetain");
    }
    return device;
  }

  // Lets a kernel have so much shared memory, and says whether this is the first time on that device.
  bool prepare(int device, const void* kernel, uint32_t shared_bytes) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    uint32_t& had = prepared_[{device, kernel}];
    const bool first = had == 0;
    if (had < shared_bytes) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
                 "cudaFuncSetAttribute");
      had = shared_bytes;
    }
    return first;
  }

 private:
  Driver() { check(found<decltype(&cuInit)>("cuInit")(0), "cuInit"); }

  static int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
  }

  template <class Function>
  static Function found(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_cuda(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion");
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(std::string("the CUDA driver has no ") + name);
    }
    return reinterpret_cast<Function>(function);
  }

  const decltype(&cuGetErrorString) error_string_ = found<decltype(&cuGetErrorString)>("cuGetErrorString");
  const decltype(&cuCtxGetCurrent) get_current_ = found<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
  const decltype(&cuCtxPushCurrent) push_ = found<decltype(&cuCtxPushCurrent)>("cuCtxPushCurrent");
  const decltype(&cuCtxPopCurrent) pop_ = found<decltype(&cuCtxPopCurrent)>("cuCtxPopCurrent");
  const decltype(&cuDeviceGet) get_device_ = found<decltype(&cuDeviceGet)>("cuDeviceGet");
  const decltype(&cuDevicePrimaryCtxRetain) retain_ =
      found<decltype(&cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain");
  const decltype(&cuFuncGetModule) get_module_ = found<decltype(&cuFuncGetModule)>("cuFuncGetModule");
  const decltype(&cuModuleGetGlobal) get_global_ = found<decltype(&cuModuleGetGlobal)>("cuModuleGetGlobal");
  mutable std::mutex mutex_;
  mutable std::map<int, Device> devices_;
  mutable std::map<std::pair<int, const void*>, uint32_t> prepared_;
};

#ifdef NLORA_BOUND_SPINS

// Tells the code of a kernel where its waits may note that they gave up. A failure costs their words alone: they trap
// all the same.
inline void prepare_spin_records(const void* kernel) {
  static std::mutex mutex;
  static bool registered = false;
  const std::lock_guard<std::mutex> lock(mutex);
  try {
    std::vector<SpinRecord>& records = spin_records();
    if (!registered) {
      registered = true;
      aside("cudaHostRegister", [&](cudaStream_t) {
        const unsigned flags = cudaHostRegisterPortable | cudaHostRegisterMapped;
        return cudaHostRegister(records.data(), kSpinRecords * sizeof(SpinRecord), flags);
      });
      std::atexit([] {
        if (const std::string report = spin_report(); !report.empty()) {
          std::fprintf(stderr, "nlora_kernels:%s\n", report.c_str());
        }
      });
    }
    void* mapped = nullptr;
    check_cuda(cudaHostGetDevicePointer(&mapped, records.data(), 0), "cudaHostGetDevicePointer");
    // Code without a wait has none.
    if (void* variable = Driver::get().variable(kernel, "nlora_spin_records")) {
      aside("nlora_spin_records", [&](cudaStream_t stream) {
        return cudaMemcpyAsync(variable, &mapped, sizeof(mapped), cudaMemcpyHostToDevice, stream);
      });
    }
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "nlora_kernels: waits that give up will not say which they are: %s\n", error.what());
  }
}

#else

inline void prepare_spin_records(const void*) {}

#endif

struct LaunchShape {
  uint32_t grid, block, cluster, shared_bytes, registers;
  bool waits = false;   // the kernel comes to grid_wait(), so it may begin before the launch before it is over
};

// Launches on one stream of a device, which is current while this lives.
class Stream {
 public:
  explicit Stream(int device = 0, void* stream = nullptr)
      : index_(device),
        stream_(static_cast<cudaStream_t>(stream)),
        device_(Driver::get().device(device)),
        current_(Driver::get(), device_.context) {}

  uint32_t processors() const { return device_.processors; }

  // 90 for compute capability 9.0.
  int architecture() const { return device_.architecture; }

  template <class Parameters>
  void launch(const LaunchShape& shape, void (*kernel)(Parameters), const Parameters& parameters) {
    // The layer rounds the start of shared memory up to its alignment.
    const uint32_t shared_bytes = shape.shared_bytes + kSharedAlignment;
    const auto code = reinterpret_cast<const void*>(kernel);
    if (Driver::get().prepare(index_, code, shared_bytes)) {
      prepare_spin_records(code);
    }
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    config.attrs = attributes;
    // NOTE: devices before sm_90 know neither, not even clusters of one.
    if (shape.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {shape.cluster, 1, 1};
    }
    // The first launch follows work of others, which it does not know; and other code than that for 9.0 never waits.
    if (shape.waits && launched_ && architecture() == 90) {
      cudaLaunchAttribute& early = attributes[config.numAttrs++];
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
    }
    launched_ = true;
    check_cuda(cudaLaunchKernelEx(&config, kernel, parameters), "cudaLaunchKernelEx");
  }

  // What launches here come after one another with.
  Sequence sequence() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long graph = 0;
    check_cuda(cudaStreamGetCaptureInfo(stream_, &status, &graph), "cudaStreamGetCaptureInfo");
    // That handle is another stream in every thread.
    const uint64_t thread = stream_ == cudaStreamPerThread ? thread_number() : 0;
    return {stream_, thread, status == cudaStreamCaptureStatusActive ? graph : 0};
  }

  // Zeroed memory that is never freed. It is no part of a graph that is being captured, and waits for nothing else.
  void* allocate_zeroed(size_t bytes) const {
    void* data = nullptr;
    aside("allocation of control words", [&](cudaStream_t stream) {
      const cudaError_t status = cudaMalloc(&data, bytes);
      return status == cudaSuccess ? cudaMemsetAsync(data, 0, bytes, stream) : status;
    });
    return data;
  }

 private:
  int index_;
  cudaStream_t stream_;
  const Driver::Device& device_;
  bool launched_ = false;
  Current<Driver, CUcontext> current_;
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

  void* inout(const void* from, size_t bytes) { return input(from, bytes); }

  void* output(size_t bytes) {
    void* data = allocate(bytes);
    check_cuda(cudaMemset(data, 0xFF, bytes), "cudaMemset");
    return data;
  }

  // Zeroed, or a copy.
  void* control(size_t bytes, const void* from = nullptr) {
    if (from) {
      return input(from, bytes);
    }
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
  const CUtensorMapSwizzle modes[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_64B,
                                      CU_TENSOR_MAP_SWIZZLE_32B};
  const cuuint64_t sizes[] = {columns, rows};
  const cuuint64_t strides[] = {row_bytes};
  const cuuint32_t box[] = {box_columns, box_rows};
  const cuuint32_t steps[] = {1, 1};
  TensorMap map;
  // NOTE: all 16-bit formats move alike; only zero fill is asked for, which is the same bits in each.
  const Driver& driver = Driver::get();
  const CUresult status =
      driver.encode_tiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides, box,
                          steps, CU_TENSOR_MAP_INTERLEAVE_NONE, modes[uint32_t(swizzle)],
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  driver.check(status, "cuTensorMapEncodeTiled");
  return map;
}

}  // namespace nlora::cuda

#endif
