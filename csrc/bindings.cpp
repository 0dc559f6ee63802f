// Python module nlora_kernels._C. A matrix is a tensor or None, a vector a matrix of one row. Arguments are checked by the
// caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;
using nlora::Matrix;
using nlora::cpu::Core;
using nlora::cpu::Stack;

namespace {

// What torch.Tensor.__dlpack_c_exchange_api__ holds, the table of DLPack's C exchange API, and what it tells of a tensor.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major, minor;
  void *previous, *allocate, *export_managed, *import_managed;
  int (*read)(PyObject* tensor, DLTensor* out);
};

// NOTE: in all a tenth of what asking for address, shape, strides and dtype by Python's calls costs.
class Tensors {
 public:
  Tensors() : type_(py::module_::import("torch").attr("Tensor")), is_neg_(type_.attr("is_neg")) {
    if (!py::hasattr(type_, "__dlpack_c_exchange_api__")) throw py::import_error("torch must be 2.11 or newer");
    const py::capsule table = type_.attr("__dlpack_c_exchange_api__");
    exchange_ = table.get_pointer<const Exchange>();
    if (exchange_->major != 1 || !exchange_->read)
      throw py::import_error("this PyTorch has another DLPack than version 1");
  }

  bool holds(py::handle object) const {
    return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type_.ptr()));
  }

  bool is_negative(py::handle tensor) const {
    PyObject* self = tensor.ptr();
    const auto result = py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_neg_.ptr(), &self, 1, nullptr));
    if (!result) throw py::error_already_set();
    return result.ptr() == Py_True;
  }

  DLTensor read(py::handle tensor) const {
    DLTensor result = {};
    if (exchange_->read(tensor.ptr(), &result)) throw py::error_already_set();
    return result;
  }

 private:
  py::object type_, is_neg_;
  const Exchange* exchange_;
};

const Tensors& tensors() {
  static const Tensors& all = *new Tensors;
  return all;
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Matrix> {
  PYBIND11_TYPE_CASTER(Matrix, const_name("Tensor | None"));

  bool load(handle source, bool) {
    value = Matrix();
    if (source.is_none()) return true;
    DLTensor t;
    return read(source, t, resolved_) && place(t, value);
  }

  // A tensor with its sign in memory: where that is a flag of the view a copy, for as long as the call lasts.
  static bool read(handle source, DLTensor& t, object& resolved) {
    if (!tensors().holds(source)) return false;
    if (tensors().is_negative(source)) {
      resolved = source.attr("resolve_neg")();
      source = resolved;
    }
    t = tensors().read(source);
    return true;
  }

  static bool place(const DLTensor& t, Matrix& value) {
    constexpr uint8_t kFloat = 2, kBFloat = 4;
    if (t.dims < 1 || t.dims > 2 || t.lanes != 1) return false;
    if (t.code == kFloat && t.bits == 32) {
      value.dtype = nlora::Dtype::kFloat32;
    } else if (t.code == kFloat && t.bits == 16) {
      value.dtype = nlora::Dtype::kFloat16;
    } else if (t.code == kBFloat) {
      value.dtype = nlora::Dtype::kBFloat16;
    } else {
      return false;
    }
    value.data = t.data;
    value.cols = t.shape[t.dims - 1], value.col_stride = t.strides[t.dims - 1];
    value.rows = t.dims == 2 ? t.shape[0] : 1;
    value.row_stride = t.dims == 2 ? t.strides[0] : value.cols * value.col_stride;
    if (!value.data) {
      // NOTE: freed storage, and tensors that hold none of their own, have no address either.
      if (value.rows && value.cols)
        throw value_error("a tensor has no memory: its storage was freed, or is held elsewhere");
      // An empty tensor has no address, but it is there.
      value.data = &value;
    }
    return true;
  }

 private:
  object resolved_;
};

template <>
struct type_caster<Stack> {
  PYBIND11_TYPE_CASTER(Stack, const_name("Tensor | None"));

  bool load(handle source, bool) {
    value = Stack();
    if (source.is_none()) return true;
    DLTensor t;
    if (!make_caster<Matrix>::read(source, t, resolved_) || t.dims < 2) return false;
    value.stride = t.strides[0];
    --t.dims, ++t.shape, ++t.strides;
    return make_caster<Matrix>::place(t, value.first);
  }

 private:
  object resolved_;
};

// N, None, or u, E, U and mask of LoRA², the last of which has no gradient.
template <>
struct type_caster<Core> {
  PYBIND11_TYPE_CASTER(Core, const_name("Tensor | tuple | None"));

  bool load(handle source, bool convert) {
    value = Core();
    if (!PyTuple_Check(source.ptr())) return place(0, value.N, source, convert);
    Matrix* const places[] = {&value.u, &value.E, &value.U, &value.mask};
    const Py_ssize_t count = PyTuple_GET_SIZE(source.ptr());
    if (count < 3 || count > 4) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!place(i, *places[i], PyTuple_GET_ITEM(source.ptr(), i), convert)) return false;
    return true;
  }

 private:
  bool place(Py_ssize_t index, Matrix& to, handle source, bool convert) {
    if (!parts_[index].load(source, convert)) return false;
    to = cast_op<Matrix&>(parts_[index]);
    return true;
  }

  // For as long as the call lasts: a copy may be theirs.
  make_caster<Matrix> parts_[4];
};

template <>
struct type_caster<nlora::cpu::Weight> {
  PYBIND11_TYPE_CASTER(nlora::cpu::Weight, const_name("Tensor | Quantised | None"));

  bool load(handle source, bool convert) {
    if (isinstance<nlora::cpu::Quantised>(source)) {
      value = nlora::cpu::Weight(source.cast<const nlora::cpu::Quantised&>());
      return true;
    }
    if (!dense_.load(source, convert)) return false;
    value = cast_op<Matrix&>(dense_);
    return true;
  }

 private:
  make_caster<Matrix> dense_;
};

}  // namespace pybind11::detail

namespace {

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// r and k of each layer, the addresses of E, u and U and of their gradients, and those of the masks or none.
std::vector<nlora::cpu::Lora2Layer> layers_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& tensors,
                                              const std::vector<int64_t>& grads, const std::vector<int64_t>& masks) {
  std::vector<nlora::cpu::Lora2Layer> layers;
  auto g = grads.begin();
  for (auto t = tensors.begin(); t < tensors.end(); t += 3, g += 3) {
    const size_t n = layers.size();
    layers.push_back({pointer<float>(t[0]), pointer<float>(t[1]), pointer<float>(t[2]),
                      masks.empty() ? nullptr : pointer<float>(masks[n]), pointer<float>(g[0]), pointer<float>(g[1]),
                      pointer<float>(g[2]), sizes[2 * n], sizes[2 * n + 1]});
  }
  return layers;
}

// in, out, r and k of each layer, the addresses of v, u, V and U, and those of their gradients or none.
std::vector<nlora::cpu::Lora2Vectors> vectors_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& tensors,
                                                 const std::vector<int64_t>& grads) {
  std::vector<nlora::cpu::Lora2Vectors> layers;
  for (size_t i = 0; i < sizes.size(); i += 4) {
    const auto tensor = [&](int j) { return pointer<float>(tensors[i + j]); };
    const auto grad = [&](int j) { return grads.empty() ? nullptr : pointer<float>(grads[i + j]); };
    layers.push_back({tensor(0), tensor(1), tensor(2), tensor(3), grad(0), grad(1), grad(2), grad(3), sizes[i],
                      sizes[i + 1], sizes[i + 2], sizes[i + 3]});
  }
  return layers;
}

#ifdef NLORA_CUDA
std::vector<const int64_t*> pointers(const std::vector<int64_t>& addresses) {
  std::vector<const int64_t*> result;
  for (int64_t address : addresses) result.push_back(pointer<int64_t>(address));
  return result;
}

void define_cuda(py::module_& m) {
  using namespace nlora::cuda;
  using free_threads = py::call_guard<py::gil_scoped_release>;
  py::class_<Queue>(m, "CudaQueue").def(py::init([](int device, int64_t stream) {
    return Queue{device, pointer<void>(stream)};
  }));
  m.def("cuda_forward_bytes", &forward_bytes);
  m.def("cuda_backward_bytes", &backward_bytes);
  m.def("cuda_set_bytes_per_cycle", &set_bytes_per_cycle);
  m.def("cuda_linear", &linear, free_threads());
  m.def("cuda_forward", &forward, free_threads());
  m.def("cuda_backward", &backward, free_threads());
  m.def("cuda_lora2_core", &lora2_core, free_threads());
  m.def("cuda_lora2_core_backward", &lora2_core_backward, free_threads());
  m.def(
      "cuda_gather",
      [](const Queue& queue, const std::vector<Matrix>& weight, const std::vector<int64_t>& rows,
         const std::vector<int64_t>& cols, const std::vector<Matrix>& A, const std::vector<Matrix>& core,
         const std::vector<Matrix>& B) { gather(queue, weight, pointers(rows), pointers(cols), A, core, B); },
      free_threads());
  m.def("cuda_residual_bytes", &residual_bytes);
  m.def("cuda_residual", &residual, free_threads());
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace nlora::cpu;
  // Kernels do not touch Python objects.
  using free_threads = py::call_guard<py::gil_scoped_release>;

  tensors();
  m.attr("float32") = int(nlora::Dtype::kFloat32);
  m.attr("bfloat16") = int(nlora::Dtype::kBFloat16);
  m.attr("float16") = int(nlora::Dtype::kFloat16);

  static const char* const kTiers[] = {"portable", "neon", "avx2", "avx512", "amx"};
  m.def(
      "cpu_tier", [] { return kTiers[int(tier())]; },
      "The instruction set in use: portable, neon, avx2, avx512 or amx.");
  m.def(
      "cap_cpu_tier",
      [](const std::string& name) {
        for (int i = 0; i < 5; ++i)
          if (name == kTiers[i]) return kTiers[int(cap_tier(Tier(i)))];
        throw py::value_error("name must be one of portable, neon, avx2, avx512, amx, got '" + name + "'");
      },
      py::arg("name"), "Uses no instruction set above the named one from now on; returns the cap before.");
  m.def(
      "cpu_multiplies", [](int dtype) { return multiplies(nlora::Dtype(dtype)); }, py::arg("dtype"),
      "Whether the CPU multiplies this dtype in hardware.");
  m.def("forked", &forked, "Whether this is a child of fork(), where the kernels run on one thread.");

  static const char* const kLayouts[] = {"nibbles", "interleaved", "bytes", "int8"};
  py::class_<Quantised>(m, "CpuQuantised")
      .def(py::init([](const std::string& layout, int64_t codes, int64_t rows, int64_t cols, int64_t values,
                       int64_t scales, int scale_dtype, int64_t block, int64_t row_stride, int64_t block_stride,
                       int64_t nested_values, int64_t nested_scales, int64_t offset, int64_t nested_block) {
             for (int i = 0; i < 4; ++i)
               if (layout == kLayouts[i])
                 return Quantised{Codes(i),
                                  pointer<uint8_t>(codes),
                                  rows,
                                  cols,
                                  pointer<float>(values),
                                  pointer<void>(scales),
                                  nlora::Dtype(scale_dtype),
                                  block,
                                  row_stride,
                                  block_stride,
                                  pointer<float>(nested_values),
                                  pointer<float>(nested_scales),
                                  pointer<float>(offset),
                                  nested_block};
             throw py::value_error("layout must be one of nibbles, interleaved, bytes, int8, got '" + layout + "'");
           }),
           "Addresses of tensors, which must be kept alive, their shape and their strides.");
  m.def("cpu_dequantise", &dequantise, free_threads());
  m.def(
      "cpu_forward",
      [](const Matrix& x, const Weight& weight, const Matrix& A, const Matrix& B, const Core& core, const Matrix& bias,
         const Matrix& y, const Matrix& T, float scaling,
         int threads) { forward({x, weight, A, B, core, bias, y, T, scaling, threads}); },
      free_threads());
  m.def(
      "cpu_backward",
      [](const Matrix& dy, const Matrix& x, const Matrix& T, const Weight& weight, const Matrix& A, const Matrix& B,
         const Core& core, const Matrix& dx, const Matrix& dweight, const Matrix& dA, const Matrix& dB,
         const Core& dcore, const Matrix& dbias, float scaling, int threads) {
        backward({dy, x, T, weight, A, B, core, dx, dweight, dA, dB, dcore, dbias, scaling, threads});
      },
      free_threads());
  m.def(
      "cpu_forward_group",
      [](const Matrix& x, const std::vector<Matrix>& weight, const std::vector<Matrix>& A, const std::vector<Matrix>& B,
         const std::vector<Matrix>& N, const std::vector<Matrix>& bias, const std::vector<Matrix>& y,
         const std::vector<Matrix>& T, const std::vector<float>& scaling, int threads) {
        std::vector<Forward> members;
        for (size_t i = 0; i < y.size(); ++i)
          members.push_back(
              {x, weight[i], A[i], B[i], Core{N[i], {}, {}, {}, {}}, bias[i], y[i], T[i], scaling[i], threads});
        forward_group(std::move(members));
      },
      free_threads());
  m.def(
      "cpu_backward_group",
      [](const std::vector<Matrix>& dy, const Matrix& x, const std::vector<Matrix>& T,
         const std::vector<Matrix>& weight, const std::vector<Matrix>& A, const std::vector<Matrix>& B,
         const std::vector<Matrix>& N, const Matrix& dx, const std::vector<std::vector<Matrix>>& grads,
         const std::vector<float>& scaling, int threads) {
        std::vector<Backward> members;
        for (size_t i = 0; i < dy.size(); ++i) {
          const auto& g = grads[i];
          const Core core = {N[i], {}, {}, {}, {}}, dcore = {g[3], {}, {}, {}, {}};
          members.push_back(
              {dy[i], x, T[i], weight[i], A[i], B[i], core, {}, g[0], g[1], g[2], dcore, g[4], scaling[i], threads});
        }
        backward_group(std::move(members), dx);
      },
      free_threads());
  m.def(
      "cpu_forward_experts",
      [](const std::vector<int64_t>& ends, const Matrix& x, const Stack& weight, const Stack& A, const Stack& B,
         const Stack& N, const Stack& bias, const Matrix& y, const Matrix& T, float scaling,
         int threads) { forward_experts({ends, x, weight, A, B, N, bias, y, T, scaling, threads}); },
      free_threads());
  m.def(
      "cpu_backward_experts",
      [](const std::vector<int64_t>& ends, const Matrix& dy, const Matrix& x, const Matrix& T, const Stack& weight,
         const Stack& A, const Stack& B, const Stack& N, const Matrix& dx, const Stack& dweight, const Stack& dA,
         const Stack& dB, const Stack& dN, const Stack& dbias, float scaling, int threads) {
        backward_experts({ends, dy, x, T, weight, A, B, N, dx, dweight, dA, dB, dN, dbias, scaling, threads});
      },
      free_threads());
  m.def("cpu_add_product", &add_product, free_threads());
  m.def("cpu_lora2_core", &lora2_core, free_threads());
  m.def("cpu_lora2_core_backward", &lora2_core_backward, free_threads());
  m.def(
      "cpu_lora2_allocate",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& tensors, const std::vector<int64_t>& grads,
         const std::vector<int64_t>& masks, int64_t exp_avg, int64_t exp_unc, int64_t kept, float beta1, float beta2,
         bool scoring, int64_t budget) {
        return lora2_allocate(layers_of(sizes, tensors, grads, masks), pointer<float>(exp_avg), pointer<float>(exp_unc),
                              pointer<uint8_t>(kept), beta1, beta2, scoring, budget);
      },
      free_threads());
  m.def(
      "cpu_lora2_penalty",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& tensors, int64_t saved, bool squared,
         int threads) {
        return lora2_penalty(vectors_of(sizes, tensors, {}), pointer<float>(saved), squared, threads);
      },
      free_threads());
  m.def(
      "cpu_lora2_penalty_backward",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& tensors, int64_t saved, float scale,
         const std::vector<int64_t>& grads, int threads) {
        lora2_penalty_backward(vectors_of(sizes, tensors, grads), pointer<float>(saved), scale, threads);
      },
      free_threads());

#ifdef NLORA_CUDA
  define_cuda(m);
#endif
}
