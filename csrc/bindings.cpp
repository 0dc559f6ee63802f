// Python module nlora_kernels._C. A matrix is None or the tuple (address, dtype, shape, strides) with a dtype of `Dtype`
// and two sizes; arguments are checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;
using nlora::Matrix;

namespace pybind11::detail {

template <>
struct type_caster<Matrix> {
  PYBIND11_TYPE_CASTER(Matrix, const_name("tuple | None"));

  bool load(handle source, bool) {
    value = Matrix();
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    const auto item = [](PyObject* tuple, int i) { return PyTuple_GET_ITEM(tuple, i); };
    PyObject *shape = item(source.ptr(), 2), *strides = item(source.ptr(), 3);
    if (!PyTuple_Check(shape) || !PyTuple_Check(strides) || PyTuple_GET_SIZE(shape) != 2 ||
        PyTuple_GET_SIZE(strides) != 2)
      return false;
    value.data = PyLong_AsVoidPtr(item(source.ptr(), 0));
    value.dtype = nlora::Dtype(PyLong_AsLong(item(source.ptr(), 1)));
    value.rows = PyLong_AsLongLong(item(shape, 0));
    value.cols = PyLong_AsLongLong(item(shape, 1));
    value.row_stride = PyLong_AsLongLong(item(strides, 0));
    value.col_stride = PyLong_AsLongLong(item(strides, 1));
    // NOTE: an empty tensor has no address, but it is there.
    if (!value.data) value.data = &value;
    if (PyErr_Occurred()) throw error_already_set();
    return true;
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

// in, out, r and k of each layer, and the addresses of v, u, V and U.
std::vector<nlora::cpu::Lora2Vectors> vectors_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& tensors) {
  std::vector<nlora::cpu::Lora2Vectors> layers;
  for (auto s = sizes.begin(), t = tensors.begin(); s < sizes.end(); s += 4, t += 4)
    layers.push_back({pointer<float>(t[0]), pointer<float>(t[1]), pointer<float>(t[2]), pointer<float>(t[3]), s[0], s[1],
                      s[2], s[3]});
  return layers;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace nlora::cpu;
  // Kernels do not touch Python objects.
  using free_threads = py::call_guard<py::gil_scoped_release>;

  m.attr("float32") = int(nlora::Dtype::kFloat32);
  m.attr("bfloat16") = int(nlora::Dtype::kBFloat16);
  m.attr("float16") = int(nlora::Dtype::kFloat16);

  static const char* const kTiers[] = {"portable", "avx2", "avx512"};
  m.def("cpu_tier", [] { return kTiers[int(tier())]; }, "The instruction set in use: portable, avx2 or avx512.");
  m.def(
      "cap_cpu_tier",
      [](const std::string& name) {
        for (int i = 0; i < 3; ++i)
          if (name == kTiers[i]) return kTiers[int(cap_tier(Tier(i)))];
        throw py::value_error("name must be one of portable, avx2, avx512, got '" + name + "'");
      },
      py::arg("name"), "Uses no instruction set above the named one from now on; returns the cap before.");
  m.def("cpu_multiplies", [](int dtype) { return multiplies(nlora::Dtype(dtype)); }, py::arg("dtype"),
        "Whether the CPU multiplies this dtype in hardware.");
  m.def("forked", &forked, "Whether this is a child of fork(), where the kernels run on one thread.");

  m.def("cpu_forward", &forward, free_threads());
  m.def("cpu_backward", &backward, free_threads());
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
         int threads) { return lora2_penalty(vectors_of(sizes, tensors), pointer<float>(saved), squared, threads); },
      free_threads());
  m.def(
      "cpu_lora2_penalty_backward",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& tensors, int64_t saved, float scale,
         int64_t grads, int threads) {
        lora2_penalty_backward(vectors_of(sizes, tensors), pointer<float>(saved), scale, pointer<float>(grads), threads);
      },
      free_threads());
}
