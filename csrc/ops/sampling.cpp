// The operations of sampling: check the fields, then switch to the device.
#include "ops/checker.h"

namespace flexdit {
namespace {

void check_state(const Checker& check, const char* field, DType dtype) {
  check.storage(field, dtype);
  check.holds(dtype == DType::float32 || dtype == DType::float64, field, " is ", name_of(dtype),
              ", must be float32 or float64");
}

void check_images(const Checker& check, int64_t channels, int64_t patch) {
  check.holds(channels >= 1, "channels is ", channels, ", must be at least 1");
  check.holds(patch >= 1, "patch is ", patch, ", must be at least 1");
}

void check_guided(const Checker& check, int64_t guided, int64_t channels) {
  check.holds(guided >= 0 && guided <= channels, "guided_channels is ", guided, ", must lie in [0, ", channels, "]");
}

// `rows` is what a buffer has room for; whether a layout fits can be seen on the CPU only.
void check_room(const Checker& check, const char* field, const TokenLayout& layout, int64_t rows) {
  const int64_t least = check.on_cpu() ? layout.total() : 0;
  check.holds(rows >= least, "rows is ", rows, ", must be at least the ", least, " tokens of ", field);
}

std::string text(const Grid& g) {
  return "[" + std::to_string(g.frames) + ", " + std::to_string(g.height) + ", " + std::to_string(g.width) + "]";
}

// That `sample` of `layout` exists and has a grid.
void check_sample(const Checker& check, const std::string& field, int64_t sample, const TokenLayout& layout,
                  const Grid& grid) {
  const std::string is = field + " is " + std::to_string(sample);
  check.holds(sample >= 0 && sample < layout.batch, is, ", must lie in [0, ", layout.batch, ")");
  check.holds(layout.grid(sample) == grid, is, ", a sample with grid ", text(layout.grid(sample)),
              ", must be one with ", text(grid));
}

void check_numbers(const Checker& check, const DenoiseStep& p) {
  for (int64_t b = 0; b < p.layout.batch; ++b) {
    const StepNumbers& c = p.numbers[b];
    const std::string name = "numbers[" + std::to_string(b) + "].";
    check_sample(check, name + "conditional", c.conditional, p.model_layout, p.layout.grid(b));
    if (c.unconditional >= 0)
      check_sample(check, name + "unconditional", c.unconditional, p.model_layout, p.layout.grid(b));
    check.holds(!c.learned_variance || p.out_channels >= 2 * p.channels, name,
                "learned_variance needs out_channels of at least ", 2 * p.channels, ", it is ", p.out_channels);
  }
}

}  // namespace

void normal_noise(const NormalNoise& p, const Execution& exec) {
  Checker check("normal_noise", exec);
  check_state(check, "out", p.out.dtype);
  check.matrix("out", p.out, p.out.rows, p.out.cols, Access::write);
  check.array("seeds", p.seeds, p.out.rows);
  FLEXDIT_RUN(cpu::kernels().normal_noise, cuda::normal_noise);
}

void denoise_step(const DenoiseStep& p, const Execution& exec) {
  Checker check("denoise_step", exec);
  check.layout("layout", p.layout, p.layout.batch);
  check.layout("model_layout", p.model_layout, p.model_layout.batch);
  check_images(check, p.channels, p.patch);
  check_guided(check, p.guided_channels, p.channels);
  check.holds(p.out_channels >= p.channels, "out_channels is ", p.out_channels, ", must be at least channels, ",
              p.channels);
  check.storage("output", p.dtype);
  check_state(check, "state", p.state);
  check_room(check, "layout", p.layout, p.rows);
  if (p.rows == 0) return;
  const int64_t area = p.patch * p.patch;
  check.array("numbers", p.numbers, p.layout.batch);
  check.images("output", p.output, p.model_layout, p.out_channels * area, p.dtype, Access::read);
  check.images("x", p.x, p.layout, p.channels * area, p.state, Access::update);
  check.images("x0", p.x0, p.layout, p.channels * area, p.state, Access::update);  // written in a first step
  if (check.on_cpu()) check_numbers(check, p);
  FLEXDIT_RUN(cpu::kernels().denoise_step, cuda::denoise_step);
}

void model_input(const ModelInput& p, const Execution& exec) {
  Checker check("model_input", exec);
  check.layout("layout", p.layout, p.layout.batch);
  check.layout("model_layout", p.model_layout, p.model_layout.batch);
  check_images(check, p.channels, p.patch);
  check.storage("input", p.dtype);
  check_state(check, "state", p.state);
  check_room(check, "model_layout", p.model_layout, p.rows);
  if (p.rows == 0) return;
  const int64_t values = p.channels * p.patch * p.patch;
  check.array("samples", p.samples, p.model_layout.batch);
  check.images("x", p.x, p.layout, values, p.state, Access::read);
  check.images("input", p.input, p.model_layout, values, p.dtype, Access::write);
  for (int64_t m = 0; check.on_cpu() && m < p.model_layout.batch; ++m)
    check_sample(check, "samples[" + std::to_string(m) + "]", p.samples[m], p.layout, p.model_layout.grid(m));
  FLEXDIT_RUN(cpu::kernels().model_input, cuda::model_input);
}

void guidance_combine(const GuidanceCombine& p, const Execution& exec) {
  Checker check("guidance_combine", exec);
  check.matrix("images", p.images, p.images.rows, p.images.cols, Access::update);
  check.holds(p.images.rows % 2 == 0, "images has ", p.images.rows, " rows, must be even");
  check.holds(p.channels >= 1 && p.images.cols % p.channels == 0, "channels is ", p.channels, ", must divide the ",
              p.images.cols, " columns of images");
  check_guided(check, p.guided_channels, p.channels);
  FLEXDIT_RUN(cpu::kernels().guidance_combine, cuda::guidance_combine);
}

void gather_rows(const GatherRows& p, const Execution& exec) {
  Checker check("gather_rows", exec);
  check.matrix("out", p.out, p.out.rows, p.out.cols, Access::write);
  if (p.out.rows == 0) return;
  check.indirect("rows", p.rows, p.out.rows, p.out.cols * size_of(p.out.dtype));
  for (int64_t b = 0; check.on_cpu() && b < p.out.rows; ++b)
    check.nonzero(("rows[" + std::to_string(b) + "]").c_str(), p.rows[b]);
  FLEXDIT_RUN(cpu::kernels().gather_rows, cuda::gather_rows);
}

void add_tables(const AddTables& p, const Execution& exec) {
  Checker check("add_tables", exec);
  check.matrix("x", p.x, p.x.rows, p.x.cols);
  check.holds(p.x.cols > 0 && p.out.cols % p.x.cols == 0, "out has ", p.out.cols,
              " columns, must have a multiple of x's ", p.x.cols);
  const int64_t count = p.out.cols / p.x.cols;
  check.matrix("table", p.table, p.own_tables ? p.x.rows * count : count, p.x.cols);
  check.matrix("out", p.out, p.x.rows, p.out.cols, Access::write);
  FLEXDIT_RUN(cpu::kernels().add_tables, cuda::add_tables);
}

}  // namespace flexdit
