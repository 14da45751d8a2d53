// Memory and order, as the arena checker sees them, of the model and of sessions on the CPU and on the emulator, captured
// graphs included: they are clean, and mistakes that are planted in them are found.
#include "arena_checker.h"

#include <set>

#include "company.h"
#include "flexdit/model.h"
#include "ops/memory.h"
#include "run_case.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

const Execution kCpu{.threads = 1}, kCuda{.device = Device::cuda};

void check_clean(const Run& run, const std::string& name) {
  const auto mistakes = mistakes_of(run);
  for (size_t i = 0; i < mistakes.size() && i < 3; ++i) CHECK_NOTE(false, name, ": ", mistakes[i]);
}

// A ragged batch through every kind of block: forward without and with a context, then backward.
class ModelCase {
 public:
  ModelCase(DType dtype, const Execution& exec) : dtype_(dtype), exec_(exec) {
    config_ = tiny_config();
    config_.hidden = 16, config_.mlp_hidden = 32, config_.reinject_position = true;
    config_.num_sdtm = 2, config_.generation_blocks = 2, config_.recovery_blocks = 2, config_.num_pooling_blocks = 2;
    Random random(23);
    for (const ParameterSpec& spec : model_parameters(config_)) {
      parameters_.emplace_back(random_values(spec.rows, spec.cols, random, 0.5), dtype);
      gradients_.emplace_back(spec.rows, spec.cols, dtype);
    }
    const int64_t pixels = config_.input_height * config_.input_width;
    const auto values = [&](int64_t channels) { return random_values(kBatch, channels * pixels, random); };
    x_ = Tensor(values(config_.in_channels), dtype), grad_out_ = Tensor(values(config_.out_channels), dtype);
    out_ = Tensor(kBatch, config_.out_channels * pixels, dtype), grad_x_ = Tensor(kBatch, x_.view().cols, dtype);
    for (size_t i = 0; i < parameters_.size(); ++i) {
      views_.push_back(parameters_[i].view());
      grad_views_.push_back(i == 0 ? Matrix{} : gradients_[i].view());
    }
    p_.config = config_, p_.parameters = views_, p_.dtype = dtype, p_.batch = kBatch;
    p_.x = x_.data(), p_.t = t_, p_.labels = labels_;
    p_.layout = layout_.view(), p_.sparse_layout = sparse_layout_.view();
    if (exec.device == Device::cuda) p_.rows = p_.layout.total() + 5, p_.sparse_rows = p_.sparse_layout.total() + 9;
    p_.grad_out = grad_out_.data(), p_.grad_x = grad_x_.data(), p_.grad_parameters = grad_views_;
  }

  // The output, and with `trains` the gradients of x and of the parameters.
  std::vector<Values> run(bool trains) {
    GuardedBytes workspace(model_workspace_bytes(p_, trains)), context(model_context_bytes(p_));
    p_.out = out_.data(), p_.workspace = workspace.data(), p_.context = trains ? context.data() : nullptr;
    expect(out_);
    if (trains)
      for (Matrix& m : grad_views_) expect(m), expect(grad_x_);
    model_forward(p_, exec_);
    if (!trains) return look({&out_});
    GuardedBytes backward(model_backward_workspace_bytes(p_));
    p_.workspace = backward.data();
    model_backward(p_, exec_);
    std::vector<Tensor*> results = {&out_, &grad_x_};
    for (size_t i = 1; i < gradients_.size(); ++i) results.push_back(&gradients_[i]);
    return look(results);
  }

 private:
  static constexpr int64_t kBatch = 3;

  // What is to be written.
  static void expect(const Matrix& m) {
    if (m && trace::recorder) trace::recorder->allocated(m.data, m.rows * m.cols * size_of(m.dtype));
  }
  static void expect(Tensor& t) { expect(t.view()); }
  static std::vector<Values> look(const std::vector<Tensor*>& tensors) {
    std::vector<Values> out;
    for (Tensor* t : tensors) {
      const Matrix m = t->view();
      const int64_t bytes = m.rows * m.cols * size_of(m.dtype);
      if (trace::recorder) trace::recorder->operation("caller", {{"result", m.data, 1, bytes, bytes, Access::read}});
      out.push_back(t->values());
    }
    return out;
  }

  DType dtype_;
  Execution exec_;
  Config config_;
  double t_[kBatch] = {3.5, 700, 999};
  int64_t labels_[kBatch] = {4, 0, 4};
  HostLayout layout_{std::vector<Grid>(kBatch, tiny_config().dense_grid())};
  HostLayout sparse_layout_{std::vector<Grid>{{1, 2, 2}, {1, 1, 1}, {1, 3, 4}}};
  std::vector<Tensor> parameters_, gradients_;
  std::vector<Matrix> views_, grad_views_;
  Tensor x_{0, 0, DType::float32}, grad_out_{0, 0, DType::float32}, out_{0, 0, DType::float32},
      grad_x_{0, 0, DType::float32};
  ModelBackward p_;
};

}  // namespace

TEST_CASE(model_is_clean) {
  for (const bool trains : {false, true})
    for (const auto& [dtype, exec] : {std::pair(DType::float64, kCpu), std::pair(DType::bfloat16, kCpu),
                                      std::pair(DType::float32, kCuda), std::pair(DType::bfloat16, kCuda)}) {
      const std::string name = check::text(name_of(dtype), exec.device == Device::cpu ? " CPU" : " CUDA");
      const auto wanted = ModelCase(dtype, exec).run(trains);
      ArenaRecorder recorder;
      check_identical(ModelCase(dtype, exec).run(trains), wanted, name);
      CHECK(recorder.run.events.size() > 100);
      check_clean(recorder.run, name);
    }
}
