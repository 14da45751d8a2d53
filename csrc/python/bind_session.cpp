// Samplers, noise and sessions.
#include <pybind11/numpy.h>

#include <variant>

#include "flexdit/checkpoint.h"
#include "flexdit/session.h"
#include "python/tensors.h"

namespace flexdit::python {
namespace {

// [channels, height, width], of a clip [channels, frames, height, width]; float32 or for a float64 model float64.
py::object image_of(const Finished& f, DType dtype, bool clip) {
  std::vector<py::ssize_t> shape = {f.channels, f.height, f.width};
  if (clip) shape.insert(shape.begin() + 1, f.frames);
  const auto as = [&](auto tag) {
    py::array_t<decltype(tag)> array(shape);
    std::copy(f.image.begin(), f.image.end(), array.mutable_data());
    return py::object(array);
  };
  return dtype == DType::float64 ? as(double{}) : as(float{});
}

// (id, image or None, why it failed)
py::tuple finished_tuple(const Finished& f, DType dtype, bool clip) {
  return py::make_tuple(f.id, f.image.empty() ? py::none() : image_of(f, dtype, clip), f.error);
}

using CaptionArray = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Of an array [tokens, channels], or of None no tokens.
CaptionInput caption_input(const std::optional<CaptionArray>& caption) {
  if (!caption) return {};
  if (caption->ndim() != 2) throw ArgumentError("a caption must be [tokens, channels]");
  return {{caption->data(), caption->data() + caption->size()}, caption->shape(0)};
}

class PythonSession {
 public:
  PythonSession(std::shared_ptr<SamplingModel> model, const SessionOptions& options)
      : dtype_(model->dtype()),
        clips_(model->config().family == ModelFamily::latte),
        session_(std::move(model), options) {}

  Session& session() { return session_; }
  py::object take(int64_t id) {
    const auto finished = session_.take(id);
    return finished ? py::object(finished_tuple(*finished, dtype_, clips_)) : py::none();
  }
  py::list take_all() {
    py::list out;
    for (const Finished& f : session_.take_all()) out.append(finished_tuple(f, dtype_, clips_));
    return out;
  }

 private:
  DType dtype_;
  bool clips_;
  Session session_;
};

void bind_samplers(py::module_& m) {
  py::class_<SamplerStep>(m, "SamplerStep", py::module_local())
      .def(py::init([](double timestep, double x0_from_x, double x0_from_output, double x_coef, double x0_coef,
                       double x0_previous_coef, double noise_coef, std::optional<std::pair<double, double>> variances) {
             SamplerStep s{timestep, x0_from_x, x0_from_output, x_coef, x0_coef, x0_previous_coef, noise_coef};
             if (!variances) return s;
             s.learned_variance = true;
             std::tie(s.log_variance_small, s.log_variance_large) = *variances;
             return s;
           }),
           py::arg("timestep"), py::arg("x0_from_x"), py::arg("x0_from_output"), py::arg("x_coef"), py::arg("x0_coef"),
           py::arg("x0_previous_coef"), py::arg("noise_coef"), py::arg("log_variances"))
      .def("values", [](const SamplerStep& s) {
        return py::make_tuple(s.timestep, s.x0_from_x, s.x0_from_output, s.x_coef, s.x0_coef, s.x0_previous_coef,
                              s.noise_coef, s.learned_variance, s.log_variance_small, s.log_variance_large);
      });
  m.def(
      "sampler_steps",
      [](const std::string& sampler, const std::variant<int64_t, std::vector<int64_t>>& steps, double eta,
         bool learned_variance) {
        const auto table = [&](const auto& s) { return sampler_steps(sampler_kind(sampler), s, eta, learned_variance); };
        return std::visit(table, steps);
      },
      py::arg("sampler"), py::arg("steps"), py::arg("eta"), py::arg("learned_variance"),
      "steps: their number, or for ddim and ddpm the timesteps, ascending.");
  m.def("derive_seed", &derive_seed);
  m.def("default_schedule", &default_schedule);
  m.def("normal_noise", [](const std::vector<uint64_t>& seeds, uint32_t draw, py::object out, int threads) {
    const NormalNoise p{.seeds = seeds.data(), .draw = draw, .out = matrix(out)};
    if (p.out.rows != static_cast<int64_t>(seeds.size())) throw ArgumentError("out must have a row for every seed");
    const py::gil_scoped_release release;
    normal_noise(p, {.threads = threads});
  });
}

}  // namespace

void bind_session(py::module_& m) {
  bind_samplers(m);
  py::register_local_exception<CheckpointError>(m, "CheckpointError", PyExc_ValueError);
  py::class_<Checkpoint>(m, "Checkpoint", py::module_local())
      .def(py::init([](const std::string& path, std::optional<DType> dtype) { return Checkpoint::load(path, dtype); }),
           py::arg("path"), py::arg("dtype"), py::call_guard<py::gil_scoped_release>())
      .def_readonly("config", &Checkpoint::config)
      .def_readonly("schedule", &Checkpoint::schedule)
      .def_readonly("dtype", &Checkpoint::dtype);
  py::class_<SamplingModel, std::shared_ptr<SamplingModel>>(m, "SamplingModel", py::module_local())
      .def(py::init([](const Config& config, const std::optional<DensitySchedule>& schedule, const py::sequence& parameters,
                       int64_t null_label, const Execution& exec) {
             const auto list = matrices(parameters);
             const SamplingModelOptions options{.config = config,
                                                .schedule = schedule,
                                                .parameters = list,
                                                .dtype = list.empty() ? DType::float32 : list[0].dtype,
                                                .null_label = null_label,
                                                .exec = exec};
             const py::gil_scoped_release release;
             return std::make_shared<SamplingModel>(options);
           }),
           py::arg("config"), py::arg("schedule"), py::arg("parameters"), py::arg("null_label"), py::arg("exec"))
      .def(py::init([](const Checkpoint& checkpoint, const Execution& exec) {
             const py::gil_scoped_release release;
             return std::const_pointer_cast<SamplingModel>(prepare_sampling(checkpoint, exec));
           }),
           py::arg("checkpoint"), py::arg("exec"));
  py::register_local_exception<QueueFull>(m, "QueueFull", PyExc_RuntimeError);
  py::class_<PythonSession>(m, "Session", py::module_local())
      .def(py::init([](std::shared_ptr<SamplingModel> model, int64_t max_batch, int64_t queue_capacity,
                       int64_t guided_channels, int64_t modulation_bytes) {
             return std::make_unique<PythonSession>(
                 std::move(model), SessionOptions{max_batch, queue_capacity, guided_channels, modulation_bytes});
           }),
           py::arg("model"), py::arg("max_batch"), py::arg("queue_capacity"), py::arg("guided_channels"),
           py::arg("modulation_bytes"))
      .def(
          "add",
          [](PythonSession& s, int64_t label, uint64_t seed, std::vector<SamplerStep> steps, double guidance,
             std::pair<double, double> interval, std::pair<int64_t, int64_t> size, std::optional<Grid> grid,
             bool clip_x0, int64_t frames, const std::optional<CaptionArray>& caption,
             const std::optional<CaptionArray>& null_caption, std::pair<double, double> resolution,
             double aspect_ratio) {
            SampleRequest r{.label = label,
                            .seed = seed,
                            .steps = std::move(steps),
                            .guidance = guidance,
                            .guidance_begin = interval.first,
                            .guidance_end = interval.second,
                            .height = size.first,
                            .width = size.second,
                            .sparse_grid = grid,
                            .clip_x0 = clip_x0,
                            .caption = caption_input(caption),
                            .null_caption = caption_input(null_caption),
                            .frames = frames,
                            .resolution = {resolution.first, resolution.second},
                            .aspect_ratio = aspect_ratio};
            const py::gil_scoped_release release;
            return s.session().add(std::move(r));
          },
          py::arg("label"), py::arg("seed"), py::arg("steps"), py::arg("guidance"), py::arg("interval"),
          py::arg("size"), py::arg("grid"), py::arg("clip_x0"), py::arg("frames"), py::arg("caption"),
          py::arg("null_caption"), py::arg("resolution"), py::arg("aspect_ratio"))
      .def("cancel", [](PythonSession& s, int64_t id) { return s.session().cancel(id); })
      .def("step", [](PythonSession& s) { return s.session().step(); }, py::call_guard<py::gil_scoped_release>())
      .def("state",
           [](PythonSession& s, int64_t id) {
             constexpr const char* kNames[] = {"queued", "active", "finished", "failed", "unknown"};
             return kNames[static_cast<size_t>(s.session().state(id))];
           })
      .def("take", &PythonSession::take)
      .def("take_all", &PythonSession::take_all)
      .def_property_readonly("active", [](PythonSession& s) { return s.session().active(); })
      .def_property_readonly("queued", [](PythonSession& s) { return s.session().queued(); });
}

}  // namespace flexdit::python
