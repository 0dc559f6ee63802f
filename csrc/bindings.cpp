// Python module nlora_kernels._C. A matrix is None, a tensor or the tuple (address, dtype, shape, strides) with a dtype of
// `Dtype`; a vector is a matrix of one row. Arguments are checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;
using nlora::Matrix;

namespace pybind11::detail {

// NOTE: a tensor's properties are read here, which costs half of what collecting them in Python does.
template <>
struct type_caster<Matrix> {
  PYBIND11_TYPE_CASTER(Matrix, const_name("Tensor | tuple | None"));

  bool load(handle source, bool) {
    value = Matrix();
    if (source.is_none()) return true;
    object address, shape, strides;
    if (PyTuple_Check(source.ptr())) {
      if (PyTuple_GET_SIZE(source.ptr()) != 4) return false;
      const auto item = [&](int i) { return reinterpret_borrow<object>(PyTuple_GET_ITEM(source.ptr(), i)); };
      address = item(0), shape = item(2), strides = item(3);
      value.dtype = nlora::Dtype(PyLong_AsLong(item(1).ptr()));
    } else {
      static const Names& names = *new Names;
      if (checked(PyObject_CallMethodNoArgs(source.ptr(), names.is_neg.ptr())).ptr() == Py_True) {
        // The sign is a flag of the view: read a copy that has it in memory, for as long as the call lasts.
        resolved = checked(PyObject_CallMethodNoArgs(source.ptr(), names.resolve_neg.ptr()));
        source = resolved;
      }
      address = checked(PyObject_CallMethodNoArgs(source.ptr(), names.data_ptr.ptr()));
      shape = checked(PyObject_GetAttr(source.ptr(), names.shape.ptr()));
      strides = checked(PyObject_CallMethodNoArgs(source.ptr(), names.stride.ptr()));
      const object dtype = checked(PyObject_GetAttr(source.ptr(), names.dtype.ptr()));
      int code = 0;
      while (code < 3 && !dtype.is(names.dtypes[code])) ++code;
      if (code == 3) return false;
      value.dtype = nlora::Dtype(code);
    }
    if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(strides.ptr())) return false;
    const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
    if (dims < 1 || dims > 2 || PyTuple_GET_SIZE(strides.ptr()) != dims) return false;
    const auto number = [](const object& tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i)); };
    value.data = PyLong_AsVoidPtr(address.ptr());
    value.cols = number(shape, dims - 1), value.col_stride = number(strides, dims - 1);
    value.rows = dims == 2 ? number(shape, 0) : 1;
    value.row_stride = dims == 2 ? number(strides, 0) : value.cols * value.col_stride;
    if (PyErr_Occurred()) throw error_already_set();
    if (!value.data) {
      // NOTE: freed storage, and tensors that hold none of their own, have no address either.
      if (value.rows && value.cols) throw value_error("a tensor has no memory: its storage was freed, or is held elsewhere");
      // An empty tensor has no address, but it is there.
      value.data = &value;
    }
    return true;
  }

 private:
  object resolved;

  struct Names {
    str is_neg{"is_neg"}, resolve_neg{"resolve_neg"}, data_ptr{"data_ptr"}, shape{"shape"}, stride{"stride"}, dtype{"dtype"};
    // In the order of Dtype.
    object dtypes[3];

    Names() {
      const module_ torch = module_::import("torch");
      dtypes[0] = torch.attr("float32"), dtypes[1] = torch.attr("bfloat16"), dtypes[2] = torch.attr("float16");
    }
  };

  static object checked(PyObject* result) {
    if (!result) throw error_already_set();
    return reinterpret_steal<object>(result);
  }
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
  m.def("cuda_slice_floats", &slice_floats);
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

  m.attr("float32") = int(nlora::Dtype::kFloat32);
  m.attr("bfloat16") = int(nlora::Dtype::kBFloat16);
  m.attr("float16") = int(nlora::Dtype::kFloat16);

  static const char* const kTiers[] = {"portable", "avx2", "avx512", "amx"};
  m.def("cpu_tier", [] { return kTiers[int(tier())]; }, "The instruction set in use: portable, avx2, avx512 or amx.");
  m.def(
      "cap_cpu_tier",
      [](const std::string& name) {
        for (int i = 0; i < 4; ++i)
          if (name == kTiers[i]) return kTiers[int(cap_tier(Tier(i)))];
        throw py::value_error("name must be one of portable, avx2, avx512, amx, got '" + name + "'");
      },
      py::arg("name"), "Uses no instruction set above the named one from now on; returns the cap before.");
  m.def("cpu_multiplies", [](int dtype) { return multiplies(nlora::Dtype(dtype)); }, py::arg("dtype"),
        "Whether the CPU multiplies this dtype in hardware.");
  m.def("forked", &forked, "Whether this is a child of fork(), where the kernels run on one thread.");

  m.def("cpu_forward", &forward, free_threads());
  m.def("cpu_backward", &backward, free_threads());
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
         int threads) { return lora2_penalty(vectors_of(sizes, tensors, {}), pointer<float>(saved), squared, threads); },
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
