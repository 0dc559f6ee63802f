// PyTorch's tensors as matrices, without linking torch: read by the table of DLPack's C exchange API, made by its Python.
#pragma once

#include <pybind11/pybind11.h>

#include "ops.h"

namespace nlora {

namespace py = pybind11;

// What torch.Tensor.__dlpack_c_exchange_api__ holds, and what it tells of a tensor.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
constexpr uint8_t kFloat = 2, kBFloat = 4;
inline bool is_floating(const DLTensor& t) { return (t.code == kFloat && t.bits >= 16) || t.code == kBFloat; }
struct Exchange {
  uint32_t major, minor;
  void *previous, *allocate, *export_managed, *import_managed;
  int (*read)(PyObject* tensor, DLTensor* out);
};

// NOTE: in all a tenth of what asking for address, shape, strides and dtype by Python's calls costs.
class Tensors {
 public:
  Tensors()
      : type_(py::module_::import("torch").attr("Tensor")),
        is_neg_(type_.attr("is_neg")),
        new_empty_(type_.attr("new_empty")),
        empty_like_(py::module_::import("torch").attr("empty_like")),
        parameter_(py::module_::import("torch").attr("nn").attr("Parameter")) {
    if (!py::hasattr(type_, "__dlpack_c_exchange_api__")) throw py::import_error("torch must be 2.11 or newer");
    const py::capsule table = type_.attr("__dlpack_c_exchange_api__");
    exchange_ = table.get_pointer<const Exchange>();
    if (exchange_->major != 1 || !exchange_->read)
      throw py::import_error("this PyTorch has another DLPack than version 1");
  }

  bool holds(py::handle object) const {
    return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(type_.ptr()));
  }

  // What it tells of PyTorch's own tensors, of no subclass, with memory; false for all else.
  bool look(py::handle object, DLTensor& tensor) const {
    const py::handle type = py::type::handle_of(object);
    if (!type.is(type_) && !type.is(parameter_)) return false;
    if (exchange_->read(object.ptr(), &tensor)) return PyErr_Clear(), false;
    return true;
  }

  bool is_negative(py::handle tensor) const { return called(is_neg_, tensor).ptr() == Py_True; }

  DLTensor read(py::handle tensor) const {
    DLTensor result = {};
    if (exchange_->read(tensor.ptr(), &result)) throw py::error_already_set();
    return result;
  }

  // NOTE: numbers for a shape, which as one object costs half the call more.
  template <typename... Sizes>
  py::object new_empty(py::handle like, const Sizes&... sizes) const {
    return called(new_empty_, like, sizes...);
  }
  py::object empty_like(py::handle tensor) const { return called(empty_like_, tensor); }

 private:
  template <typename... Arguments>
  static py::object called(const py::object& function, const Arguments&... arguments) {
    PyObject* const given[] = {arguments.ptr()...};
    auto result =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(function.ptr(), given, sizeof...(arguments), nullptr));
    if (!result) throw py::error_already_set();
    return result;
  }

  py::object type_, is_neg_, new_empty_, empty_like_, parameter_;
  const Exchange* exchange_;
};

inline const Tensors& tensors() {
  static const Tensors& all = *new Tensors;
  return all;
}

// A tensor of one or two dimensions and the matrix in it, or None.
struct Tensor {
  py::object object = py::none();
  Matrix matrix;

  // False for what no kernel reads.
  bool load(py::handle source);

  explicit operator bool() const { return bool(matrix); }

  // New contiguous tensors of its dtype: of a shape, and of its own.
  template <typename... Sizes>
  Tensor empty(Sizes... shape) const {
    return made(tensors().new_empty(object, py::int_(shape)...));
  }
  Tensor empty_like() const {
    const auto& [data, dtype, rows, cols, row_stride, col_stride] = matrix;
    // NOTE: a shape costs twice the call, but PyTorch would keep the strides of a transposed one.
    const bool contiguous = (cols <= 1 || col_stride == 1) && (rows <= 1 || row_stride == cols);
    return made(contiguous ? tensors().empty_like(object) : tensors().new_empty(object, object.attr("shape")));
  }

 private:
  static Tensor made(const py::object& tensor);
};

// A tensor with its sign in memory: where that is a flag of the view, a copy.
inline py::object resolved(py::handle tensor) {
  return tensors().is_negative(tensor) ? tensor.attr("resolve_neg")() : py::reinterpret_borrow<py::object>(tensor);
}

// False for what no kernel reads.
inline bool as_matrix(const DLTensor& t, Matrix& matrix) {
  if (t.dims < 1 || t.dims > 2 || t.lanes != 1) return false;
  if (t.code == kFloat && t.bits == 32) {
    matrix.dtype = Dtype::kFloat32;
  } else if (t.code == kFloat && t.bits == 16) {
    matrix.dtype = Dtype::kFloat16;
  } else if (t.code == kBFloat) {
    matrix.dtype = Dtype::kBFloat16;
  } else {
    return false;
  }
  matrix.data = t.data;
  matrix.cols = t.shape[t.dims - 1], matrix.col_stride = t.strides[t.dims - 1];
  matrix.rows = t.dims == 2 ? t.shape[0] : 1;
  matrix.row_stride = t.dims == 2 ? t.strides[0] : matrix.cols * matrix.col_stride;
  if (!matrix.data) {
    // NOTE: freed storage, and tensors that hold none of their own, have no address either.
    if (matrix.rows && matrix.cols)
      throw py::value_error("a tensor has no memory: its storage was freed, or is held elsewhere");
    // An empty tensor has no address, but it is there.
    static char nowhere;
    matrix.data = &nowhere;
  }
  return true;
}

inline bool Tensor::load(py::handle source) {
  *this = Tensor();
  if (source.is_none()) return true;
  if (!tensors().holds(source)) return false;
  object = resolved(source);
  return as_matrix(tensors().read(object), matrix);
}

inline Tensor Tensor::made(const py::object& tensor) {
  Tensor result;
  result.object = tensor;
  if (!as_matrix(tensors().read(tensor), result.matrix)) throw py::type_error("PyTorch made no such tensor");
  return result;
}

// One whose columns lie side by side, or a copy where they do not.
struct Rows : Tensor {
  bool load(py::handle source) {
    if (!Tensor::load(source)) return false;
    const bool readable = matrix.col_stride == 1 || matrix.cols <= 1 || !matrix.rows;
    return readable || Tensor::load(py::object(object.attr("contiguous")()));
  }
};

// A weight as an operand: dense, or in few bits.
struct WeightTensor {
  Tensor dense;
  cpu::Weight matrix;

  bool load(py::handle source) {
    *this = WeightTensor();
    if (source.is_none() || tensors().holds(source)) {
      if (!dense.load(source)) return false;
      matrix = dense.matrix;
      return true;
    }
    if (!py::isinstance<cpu::Quantised>(source)) return false;
    matrix = cpu::Weight(source.cast<const cpu::Quantised&>());
    return true;
  }
};

// N, None, or the tuple of u, E, U and mask of LoRA².
struct CoreTensors {
  Tensor N, u, E, U, mask;

  bool load(py::handle source) {
    if (!PyTuple_Check(source.ptr())) return N.load(source);
    if (PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    const auto item = [&](int i) { return py::handle(PyTuple_GET_ITEM(source.ptr(), i)); };
    // A mask may be of any dtype.
    return u.load(item(0)) && E.load(item(1)) && U.load(item(2)) &&
           (mask.load(item(3)) || mask.load(py::object(item(3).attr("float")())));
  }

  explicit operator bool() const { return N || u; }

  // New ones for the gradients, of which a mask has none.
  CoreTensors empty_like() const {
    if (N) return {N.empty_like(), {}, {}, {}, {}};
    return {{}, u.empty_like(), E.empty_like(), U.empty_like(), {}};
  }

  cpu::Core matrices() const { return {N.matrix, u.matrix, E.matrix, U.matrix, mask.matrix}; }
  py::object object() const { return u ? py::make_tuple(u.object, E.object, U.object) : N.object; }
};

}  // namespace nlora

namespace pybind11::detail {

template <typename T>
struct loading_caster {
  PYBIND11_TYPE_CASTER(T, const_name("Tensor | None"));

  bool load(handle source, bool) { return value.load(source); }
};

template <>
struct type_caster<nlora::Tensor> : loading_caster<nlora::Tensor> {};
template <>
struct type_caster<nlora::Rows> : loading_caster<nlora::Rows> {};
template <>
struct type_caster<nlora::WeightTensor> : loading_caster<nlora::WeightTensor> {};
template <>
struct type_caster<nlora::CoreTensors> : loading_caster<nlora::CoreTensors> {};

template <>
struct type_caster<nlora::cpu::Stack> {
  PYBIND11_TYPE_CASTER(nlora::cpu::Stack, const_name("Tensor | None"));

  bool load(handle source, bool) {
    value = nlora::cpu::Stack();
    if (source.is_none()) return true;
    if (!nlora::tensors().holds(source)) return false;
    tensor_ = nlora::resolved(source);
    nlora::DLTensor t = nlora::tensors().read(tensor_);
    if (t.dims < 2) return false;
    value.stride = t.strides[0];
    --t.dims, ++t.shape, ++t.strides;
    return nlora::as_matrix(t, value.first);
  }

 private:
  // For as long as the call lasts: it may be a copy.
  object tensor_;
};

template <>
struct type_caster<nlora::Matrix> {
  PYBIND11_TYPE_CASTER(nlora::Matrix, const_name("Tensor | None"));

  bool load(handle source, bool) {
    if (!tensor_.load(source)) return false;
    value = tensor_.matrix;
    return true;
  }

 private:
  // For as long as the call lasts: it may be a copy.
  nlora::Tensor tensor_;
};

}  // namespace pybind11::detail
