#include "python/tensors.h"

#include <cstring>
#include <string>
#include <utility>

namespace flexdit::python {
namespace {

std::vector<std::pair<PyObject*, DType>>& registered() {
  static std::vector<std::pair<PyObject*, DType>> dtypes;  // referenced for the life of the process
  return dtypes;
}

}  // namespace

void register_dtype(py::object dtype, DType value) { registered().emplace_back(dtype.release().ptr(), value); }

DType dtype_of(py::handle tensor) {
  const py::object dtype = tensor.attr("dtype");
  for (const auto& [known, value] : registered())
    if (known == dtype.ptr()) return value;
  throw py::type_error("dtype is " + py::str(dtype).cast<std::string>() +
                       ", must be float32, bfloat16, float16 or float64");
}

Matrix matrix(py::handle tensor) {
  if (tensor.is_none()) return {};
  const auto shape = tensor.attr("shape").cast<std::vector<int64_t>>();
  const auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
  Matrix m;
  m.data = pointer<void>(tensor);
  m.dtype = dtype_of(tensor);
  m.rows = shape.size() < 2 ? 1 : shape[0];
  m.cols = 1;
  for (size_t i = shape.size() < 2 ? 0 : 1; i < shape.size(); ++i) m.cols *= shape[i];
  m.stride = shape.size() < 2 ? m.cols : strides[0];
  int64_t expected = 1;  // everything behind the first dimension must be contiguous
  for (size_t i = shape.size(); i-- > (shape.size() < 2 ? 0 : 1);) {
    if (shape[i] > 1 && strides[i] != expected)
      throw ArgumentError("tensor is not contiguous behind its first dimension");
    expected *= shape[i];
  }
  if (m.rows <= 1) m.stride = std::max(m.stride, m.cols);
  return m;
}

Matrix matrix_rows(py::handle tensor, int64_t rows) {
  Matrix m = matrix(tensor);
  if (m && m.rows < rows)
    throw ArgumentError("tensor has " + std::to_string(m.rows) + " rows, must have at least " + std::to_string(rows));
  if (m) m.rows = rows;
  return m;
}

std::vector<Matrix> matrices(const py::sequence& tensors) {
  std::vector<Matrix> list;
  list.reserve(tensors.size());
  for (const auto& tensor : tensors) list.push_back(matrix(tensor));
  return list;
}

TokenLayout layout(py::handle table) {
  if (table.is_none()) return {};
  const auto shape = table.attr("shape").cast<std::vector<int64_t>>();
  const size_t lines = shape.size() == 3 ? 1 : 0;  // the dimension of samples
  if (shape.size() != 2 + lines || shape[lines] < 1 || shape[lines + 1] != 4)
    throw ArgumentError("layout table must be [batch + 1, 4] or, with a row map, [k, batch + 1, 4]");
  TokenLayout l{pointer<const LayoutRow>(table), shape[lines] - 1};
  if (lines && shape[0] > 1) l.row_map = reinterpret_cast<const int32_t*>(l.table + shape[lines]);
  return l;
}

void clear_spare_rows(const Matrix& m, const TokenLayout& layout, const Execution& exec) {
  if (!m || exec.device != Device::cpu) return;
  for (int64_t r = layout.total(); r < m.rows; ++r)
    std::memset(m.row_range(r, 1).data, 0, static_cast<size_t>(m.cols * size_of(m.dtype)));
}

}  // namespace flexdit::python
