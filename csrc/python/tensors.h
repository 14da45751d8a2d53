// Python tensors (torch.Tensor, or anything with data_ptr(), shape, stride() and dtype) as views.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "flexdit/model.h"

namespace pybind11::detail {

// A grid is a tuple (h, w) or (f, h, w) in Python; grids of one frame come back as (h, w).
template <>
struct type_caster<flexdit::Grid> {
  PYBIND11_TYPE_CASTER(flexdit::Grid, const_name("tuple[int, ...]"));

  bool load(handle source, bool) {
    if (!isinstance<sequence>(source)) return false;
    const auto sides = reinterpret_borrow<sequence>(source);
    if (sides.size() != 2 && sides.size() != 3) return false;
    const size_t first = sides.size() - 2;
    value.frames = first ? sides[0].cast<int32_t>() : 1;
    value.height = sides[first].cast<int32_t>();
    value.width = sides[first + 1].cast<int32_t>();
    return true;
  }
  static handle cast(const flexdit::Grid& grid, return_value_policy, handle) {
    if (grid.frames == 1) return make_tuple(grid.height, grid.width).release();
    return make_tuple(grid.frames, grid.height, grid.width).release();
  }
};

}  // namespace pybind11::detail

namespace flexdit::python {

namespace py = pybind11;

// Python's dtype objects, registered once by flexdit_ext: the library itself does not import torch.
void register_dtype(py::object dtype, DType value);
DType dtype_of(py::handle tensor);

// [n] becomes [1, n]; more than two dimensions are rows of everything behind the first. None becomes an empty view.
Matrix matrix(py::handle tensor);
Matrix matrix_rows(py::handle tensor, int64_t rows);  // the first rows of it
std::vector<Matrix> matrices(const py::sequence& tensors);
TokenLayout layout(py::handle table);  // int32 [B + 1, 4], or [k, B + 1, 4]: the table, then its row map, flat

template <class T>
T* pointer(py::handle tensor) {
  return tensor.is_none() ? nullptr : reinterpret_cast<T*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

// On the CPU: sets the rows behind the packed ones to zero, so that spare rows never hold garbage. On a GPU the kernels
// do so.
void clear_spare_rows(const Matrix& m, const TokenLayout& layout, const Execution& exec);

void bind_ops(py::module_& m);
void bind_model(py::module_& m);
void bind_session(py::module_& m);

}  // namespace flexdit::python
