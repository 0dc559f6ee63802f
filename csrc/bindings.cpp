// Python module nlora_kernels._C. A matrix is a tensor or None, a vector a matrix of one row. Arguments are checked by the
// caller; what the CPU's operations return is new and contiguous.
#include <pybind11/stl.h>

#include "tensors.h"

namespace py = pybind11;
using nlora::CoreTensors;
using nlora::DLTensor;
using nlora::is_floating;
using nlora::Matrix;
using nlora::Rows;
using nlora::Tensor;
using nlora::WeightTensor;
using nlora::cpu::Stack;

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

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// What a dictionary, or the one of an object's own attributes, has under a name, borrowed; null for nothing.
PyObject* found(PyObject* dict, PyObject* name) {
  return dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, name) : nullptr;
}
PyObject* own(PyObject* object, PyObject* name) {
  if (!object) return nullptr;
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!dict) throw py::error_already_set();
  return found(dict.ptr(), name);
}

// The weight of a module of these types, without hooks or a forward of its own, if it is plain, borrowed; else null. It
// is the usual answer to `obstacle` (layers/branch.py), which looks at everything else itself.
PyObject* plain_weight(PyObject* module, const py::tuple& types) {
  static PyObject* const kHooks[] = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                     interned("_backward_hooks"), interned("_backward_pre_hooks")};
  static PyObject* const kForwards[] = {interned("forward"), interned("_hf_tp_plan")};
  static PyObject* const kParameters = interned("_parameters");
  static PyObject* const kWeight = interned("weight");
  if (!module || !PySequence_Contains(types.ptr(), py::type::handle_of(module).ptr())) return nullptr;
  const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  if (!attributes) throw py::error_already_set();
  for (PyObject* name : kHooks) {
    PyObject* hooks = found(attributes.ptr(), name);
    if (!hooks || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks)) return nullptr;
  }
  for (PyObject* name : kForwards)
    if (found(attributes.ptr(), name)) return nullptr;
  PyObject* weight = found(found(attributes.ptr(), kParameters), kWeight);
  DLTensor seen;
  return weight && nlora::tensors().look(weight, seen) && is_floating(seen) ? weight : nullptr;
}

bool is_plain(py::handle module, const py::tuple& types) { return plain_weight(module.ptr(), types); }

// The weights of an adapter of a PEFT layer, from those of these mappings that have it, if they, and that of the base layer
// if it is asked, are plain; else None.
py::object plain_weights(py::handle layer, py::handle adapter, const py::tuple& mappings, const py::tuple& types,
                         bool base) {
  static PyObject* const kModules = interned("_modules");
  static PyObject* const kBase = interned("base_layer");
  PyObject* modules = own(layer.ptr(), kModules);
  if (base && !plain_weight(found(modules, kBase), types)) return py::none();
  py::list weights;
  for (const py::handle mapping : mappings) {
    PyObject* module = found(own(found(modules, mapping.ptr()), kModules), adapter.ptr());
    if (!module) continue;
    PyObject* weight = plain_weight(module, types);
    if (!weight) return py::none();
    weights.append(py::handle(weight));
  }
  return weights;
}

// Whether the tensors of a call go together: the usual answer to `check_lora_linear` (ops/checks.py), which says what is
// wrong. Without A and B it is a layer without an adapter, without weight all else of one; N may be the tuple of u, E, U
// and mask of LoRA².
bool fits(py::handle x, py::handle weight, py::handle A, py::handle B, py::handle N, py::handle bias) {
  DLTensor first, t;
  if (!nlora::tensors().look(x, first) || !is_floating(first) || first.dims < 1) return false;
  const auto agree = [](int64_t& known, int64_t size) { return (known < 0 ? known = size : known) == size; };
  // Whether t, the next tensor, is on x's device and of these sizes, of which those that are not known become its own.
  const auto has = [&](py::handle tensor, auto&... sizes) {
    if (!nlora::tensors().look(tensor, t) || t.dims != sizeof...(sizes)) return false;
    if (t.device_type != first.device_type || t.device_id != first.device_id) return false;
    const int64_t* size = t.shape;
    return (agree(sizes, *size++) && ...);
  };
  const auto same = [&](const DLTensor& as) { return t.code == as.code && t.bits == as.bits; };
  int64_t in = first.shape[first.dims - 1], out = -1, rank = -1, values = -1;
  const auto core_fits = [&] {
    if (N.is_none()) return true;
    if (!PyTuple_Check(N.ptr())) return has(N, rank, rank) && is_floating(t);
    if (PyTuple_GET_SIZE(N.ptr()) != 4) return false;
    const auto part = [&](int i) { return py::handle(PyTuple_GET_ITEM(N.ptr(), i)); };
    if (!has(part(0), values, rank) || !values || !is_floating(t)) return false;
    const DLTensor u = t;
    return has(part(1), values) && same(u) && has(part(2), rank, values) && same(u) &&
           (part(3).is_none() || has(part(3), values));
  };
  if (!weight.is_none() && (!has(weight, out, in) || !same(first))) return false;
  if (!bias.is_none() && (!has(bias, out) || !same(first))) return false;
  if (A.is_none() && B.is_none() && N.is_none()) return true;
  return has(A, rank, in) && rank && is_floating(t) && has(B, out, rank) && is_floating(t) && core_fits();
}

// Runs while other threads of Python may, unless its multiply-adds take no longer than to let them.
template <typename Function>
void unlocked(int64_t multiplies, const Function& function) {
  if (multiplies < 1 << 14) return function();
  const py::gil_scoped_release released;
  function();
}

// (y, T)
py::tuple cpu_forward(const Rows& x, const WeightTensor& weight, const Rows& A, const Tensor& B,
                      const CoreTensors& core, const Tensor& bias, float scaling, int threads, int pieces) {
  const int64_t M = x.matrix.rows;
  const Tensor y = x.empty(M, B.matrix.rows), T = x.empty(M, A.matrix.rows);
  unlocked(M * A.matrix.cols * B.matrix.rows, [&] {
    nlora::cpu::forward({x.matrix, weight.matrix, A.matrix, B.matrix, core.matrices(), bias.matrix, y.matrix, T.matrix,
                         scaling, threads, pieces});
  });
  return py::make_tuple(y.object, T.object);
}

// (dx, dweight, dA, dB, dcore, None), of those that `needs` asks for in this order; no dweight without weight.
py::tuple cpu_backward(const Rows& dy, const Rows& x, const Rows& T, const WeightTensor& weight, const Rows& A,
                       const Tensor& B, const CoreTensors& core, const std::array<bool, 6>& needs, float scaling,
                       int threads, int pieces) {
  const int64_t M = dy.matrix.rows, N = dy.matrix.cols, K = A.matrix.cols;
  // NOTE: to name a shape costs as much as the tensor.
  const Tensor dx = !needs[0] ? Tensor() : x ? x.empty_like() : dy.empty(M, K);
  const Tensor dweight = needs[1] && weight.dense ? weight.dense.empty_like() : Tensor();
  const Tensor dA = needs[2] ? A.empty_like() : Tensor(), dB = needs[3] ? B.empty_like() : Tensor();
  const CoreTensors dcore = needs[4] ? core.empty_like() : CoreTensors();
  unlocked(M * N * K, [&] {
    nlora::cpu::backward({dy.matrix, x.matrix, T.matrix, weight.matrix, A.matrix, B.matrix, core.matrices(), dx.matrix,
                          dweight.matrix, dA.matrix, dB.matrix, dcore.matrices(), scaling, threads, pieces});
  });
  return py::make_tuple(dx.object, dweight.object, dA.object, dB.object, dcore.object(), py::none());
}

// [(y, T)] of layers that share x; without A there is no T.
py::list cpu_forward_group(const Rows& x, const std::vector<Tensor>& weight, const std::vector<Rows>& A,
                           const std::vector<Tensor>& B, const std::vector<Tensor>& N, const std::vector<Tensor>& bias,
                           const std::vector<float>& scaling, int threads, int pieces) {
  const int64_t M = x.matrix.rows;
  std::vector<nlora::cpu::Forward> members;
  py::list results;
  int64_t multiplies = 0;
  for (size_t i = 0; i < A.size(); ++i) {
    const int64_t columns = weight[i] ? weight[i].matrix.rows : B[i].matrix.rows;
    const Tensor y = x.empty(M, columns), T = A[i] ? x.empty(M, A[i].matrix.rows) : Tensor();
    const nlora::cpu::Core core = {N[i].matrix, {}, {}, {}, {}};
    members.push_back({x.matrix, weight[i].matrix, A[i].matrix, B[i].matrix, core, bias[i].matrix, y.matrix, T.matrix,
                       scaling[i], threads, pieces});
    results.append(py::make_tuple(y.object, T.object));
    multiplies += M * columns * x.matrix.cols;
  }
  unlocked(multiplies, [&] { nlora::cpu::forward_group(std::move(members)); });
  return results;
}

// dx and [(None, dweight, dA, dB, dN, None)] of layers that share x, as cpu_backward has them.
py::tuple cpu_backward_group(const std::vector<Rows>& dy, const Rows& x, const std::vector<Rows>& T,
                             const std::vector<Tensor>& weight, const std::vector<Rows>& A,
                             const std::vector<Tensor>& B, const std::vector<Tensor>& N,
                             const std::vector<std::array<bool, 6>>& needs, const std::vector<float>& scaling,
                             int threads, int pieces) {
  const int64_t M = dy[0].matrix.rows, K = (weight[0] ? weight[0] : A[0]).matrix.cols;
  const Tensor dx = needs[0][0] ? dy[0].empty(M, K) : Tensor();
  std::vector<nlora::cpu::Backward> members;
  py::list results;
  int64_t multiplies = 0;
  for (size_t i = 0; i < dy.size(); ++i) {
    const auto wanted = [&](int input, const Tensor& of) { return needs[i][input] && of ? of.empty_like() : Tensor(); };
    const Tensor dweight = wanted(1, weight[i]), dA = wanted(2, A[i]), dB = wanted(3, B[i]), dN = wanted(4, N[i]);
    const nlora::cpu::Core core = {N[i].matrix, {}, {}, {}, {}}, dcore = {dN.matrix, {}, {}, {}, {}};
    members.push_back({dy[i].matrix,
                       x.matrix,
                       T[i].matrix,
                       weight[i].matrix,
                       A[i].matrix,
                       B[i].matrix,
                       core,
                       {},
                       dweight.matrix,
                       dA.matrix,
                       dB.matrix,
                       dcore,
                       scaling[i],
                       threads,
                       pieces});
    results.append(py::make_tuple(py::none(), dweight.object, dA.object, dB.object, dN.object, py::none()));
    multiplies += M * dy[i].matrix.cols * K;
  }
  unlocked(multiplies, [&] { nlora::cpu::backward_group(std::move(members), dx.matrix); });
  return py::make_tuple(dx.object, results);
}

py::object cpu_lora2_core(const CoreTensors& core) {
  const int64_t k = core.u.matrix.cols;
  const Tensor result = core.u.empty(k, k);
  unlocked(k * k * core.u.matrix.rows, [&] { nlora::cpu::lora2_core(core.matrices(), result.matrix); });
  return result.object;
}

// (du, dE, dU)
py::object cpu_lora2_core_backward(const Tensor& dN, const CoreTensors& core) {
  const CoreTensors grads = core.empty_like();
  const Matrix& u = core.u.matrix;
  unlocked(u.cols * u.cols * u.rows,
           [&] { nlora::cpu::lora2_core_backward(dN.matrix, core.matrices(), grads.matrices()); });
  return grads.object();
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
  m.def(
      "cuda_forward",
      [](const Queue& queue, const Matrix& x, const Matrix& weight, const Matrix& A, const Matrix& B,
         const Matrix& core, const Matrix& bias, const Matrix& y, const Matrix& T, const Matrix& workspace,
         float scaling) {
        const Forward layer{x, weight, A, B, core, bias, y, T, scaling};
        forward(queue, &layer, 1, workspace);
      },
      free_threads());
  m.def(
      "cuda_backward",
      [](const Queue& queue, const Matrix& dy, const Matrix& x, const Matrix& T, const Matrix& weight, const Matrix& A,
         const Matrix& B, const Matrix& core, const Matrix& dx, const Matrix& dA, const Matrix& dB, const Matrix& dcore,
         const Matrix& workspace, float scaling) {
        const Backward layer{dy, x, T, weight, A, B, core, dx, dA, dB, dcore, scaling};
        backward(queue, &layer, 1, workspace);
      },
      free_threads());
  m.def(
      "cuda_forward_group",
      [](const Queue& queue, const Matrix& x, const std::vector<Matrix>& weight, const std::vector<Matrix>& A,
         const std::vector<Matrix>& B, const std::vector<Matrix>& core, const std::vector<Matrix>& bias,
         const std::vector<Matrix>& y, const std::vector<Matrix>& T, const Matrix& workspace,
         const std::vector<float>& scaling) {
        std::vector<Forward> layers;
        for (size_t i = 0; i < weight.size(); ++i)
          layers.push_back({x, weight[i], A[i], B[i], core[i], bias[i], y[i], T[i], scaling[i]});
        forward(queue, layers.data(), layers.size(), workspace);
      },
      free_threads());
  m.def(
      "cuda_backward_group",
      [](const Queue& queue, const std::vector<Matrix>& dy, const Matrix& x, const std::vector<Matrix>& T,
         const std::vector<Matrix>& weight, const std::vector<Matrix>& A, const std::vector<Matrix>& B,
         const std::vector<Matrix>& core, const Matrix& dx, const std::vector<Matrix>& dA,
         const std::vector<Matrix>& dB, const std::vector<Matrix>& dcore, const Matrix& workspace,
         const std::vector<float>& scaling) {
        std::vector<Backward> layers;
        for (size_t i = 0; i < weight.size(); ++i)
          layers.push_back({dy[i], x, T[i], weight[i], A[i], B[i], core[i], dx, dA[i], dB[i], dcore[i], scaling[i]});
        backward(queue, layers.data(), layers.size(), workspace);
      },
      free_threads());
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

  nlora::tensors();
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
  m.def("release_team", &release_team,
        "Ends the threads that OpenMP keeps for the calling thread, which has new ones when it needs some again.");

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
  m.def("is_plain", &is_plain);
  m.def("plain_weights", &plain_weights);
  m.def("fits", &fits);
  m.def("cpu_forward", &cpu_forward);
  m.def("cpu_backward", &cpu_backward);
  m.def("cpu_forward_group", &cpu_forward_group);
  m.def("cpu_backward_group", &cpu_backward_group);
  m.def(
      "cpu_forward_experts",
      [](const std::vector<int64_t>& ends, const Rows& x, const Stack& weight, const Stack& A, const Stack& B,
         const Stack& N, const Stack& bias, const Matrix& y, const Matrix& T, float scaling, int threads,
         int pieces) { forward_experts({ends, x.matrix, weight, A, B, N, bias, y, T, scaling, threads, pieces}); },
      free_threads());
  m.def(
      "cpu_backward_experts",
      [](const std::vector<int64_t>& ends, const Rows& dy, const Rows& x, const Rows& T, const Stack& weight,
         const Stack& A, const Stack& B, const Stack& N, const Matrix& dx, const Stack& dweight, const Stack& dA,
         const Stack& dB, const Stack& dN, float scaling, int threads, int pieces) {
        backward_experts(
            {ends, dy.matrix, x.matrix, T.matrix, weight, A, B, N, dx, dweight, dA, dB, dN, scaling, threads, pieces});
      },
      free_threads());
  m.def("cpu_add_product", &add_product, free_threads());
  m.def("cpu_lora2_core", &cpu_lora2_core);
  m.def("cpu_lora2_core_backward", &cpu_lora2_core_backward);
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
