// The Python module flexdit_ext._C. Bindings only bind: arguments are views, every buffer is the caller's.
#include <omp.h>

#include "cpu/kernels.h"
#include "python/tensors.h"

namespace flexdit::python {
namespace {

void bind_schedule(py::module_& m) {
  py::class_<DensitySchedule>(m, "DensitySchedule", py::module_local())
      .def(py::init<std::vector<Grid>, int64_t>())
      .def(py::init<std::vector<Grid>, std::vector<int64_t>, int64_t>())
      .def_static("from_pruning_rates", &DensitySchedule::from_pruning_rates)
      .def_static("continuous", &DensitySchedule::continuous)
      .def("grid", &DensitySchedule::grid)
      .def("segment", &DensitySchedule::segment)
      .def("pruning_rate", &DensitySchedule::pruning_rate)
      .def_property_readonly("grids", &DensitySchedule::grids)
      .def_property_readonly("begins", &DensitySchedule::begins)
      .def_property_readonly("num_timesteps", &DensitySchedule::num_timesteps)
      .def("__eq__", &DensitySchedule::operator==);
  m.def("pruning_rate_at", &pruning_rate_at);
}

// Where to compute: on the CPU with this many threads, or on a GPU's stream.
void bind_execution(py::module_& m) {
  py::class_<Execution>(m, "Execution", py::module_local())
      .def(py::init([](int threads) { return Execution{.threads = threads}; }), py::arg("threads"))
      .def(py::init([](int device_index, uintptr_t stream) {
             return Execution{.device = Device::cuda,
                              .device_index = device_index,
                              .stream = reinterpret_cast<void*>(stream)};
           }),
           py::arg("device_index"), py::arg("stream"));
}

py::dict build_info() {
  py::dict info;
  info["version"] = FLEXDIT_VERSION;
  info["compiler"] = std::string("gcc-compatible ") + __VERSION__;
#ifdef FLEXDIT_CUDA_ARCHITECTURES
  info["cuda"] = FLEXDIT_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
#endif
  info["instruction_set"] = cpu::instruction_set();
  info["onednn"] = cpu::onednn_version();
  info["openmp_threads"] = omp_get_max_threads();
  return info;
}

}  // namespace
}  // namespace flexdit::python

// The tests build the same module once more on the emulator, under another name; types are local to each.
#ifndef FLEXDIT_MODULE
#define FLEXDIT_MODULE _C
#endif
PYBIND11_MODULE(FLEXDIT_MODULE, m) {
  namespace fp = flexdit::python;
  m.doc() = "The torch-free core of flexdit_ext; see flexdit_ext for the public interface.";
  pybind11::enum_<flexdit::DType>(m, "DType", pybind11::module_local())
      .value("float32", flexdit::DType::float32)
      .value("bfloat16", flexdit::DType::bfloat16)
      .value("float16", flexdit::DType::float16)
      .value("float64", flexdit::DType::float64);
  m.def("register_dtype", &fp::register_dtype);
  m.def("build_info", &fp::build_info);
  fp::bind_execution(m);
  fp::bind_schedule(m);
  fp::bind_ops(m);
  fp::bind_model(m);
  fp::bind_session(m);
}
