// How gemm_cuda.cpp asks cuBLASLt: against a fake one that computes in loops, takes nothing that NVIDIA's documentation
// does not allow, and refuses epilogues when told to.
#include <cstdlib>

#include "message_of.h"
#include "run_case.h"
#include "tests/fake_cublaslt.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

const Execution kCuda{.device = Device::cuda};
constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};

bool tunes() { return std::getenv("FLEXDIT_TUNE") != nullptr; }

// Resets what the fake has counted and gives its refusals back at the end.
struct Fake {
  FakeCublasLt& seen;
  Fake() : seen(*fake_cublaslt()) { seen = {}; }
  ~Fake() { seen = {}; }
};

void check_linear_cases(Worst& worst) {
  for (const OpCase& c : linear_cases()) {
    const Inputs given = inputs_of(c);
    const Result exact = run(c, given, DType::float64, false, {});
    for (const DType dtype : kTypes)
      for (const bool strided : {false, true}) worst.compare(run(c, given, dtype, strided, kCuda), exact, dtype, c);
  }
}

// y = GELU(x W^T + b) with what is before it kept, in a matrix that begins `shift` values behind a multiple of 16 bytes
// and has as many between its rows.
class Kept {
 public:
  Kept(DType dtype, int64_t m, int64_t n, int64_t k, int64_t shift = 0)
      : x_(random(m, k), dtype),
        weight_(random(n, k), dtype),
        bias_(random(1, n), dtype),
        y_(m, n, dtype),
        memory_(static_cast<size_t>((m + 1) * (n + shift) + 16)) {
    auto* begin = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.data()) + 15) / 16 * 16);
    before_ = {begin + shift * size_of(dtype), m, n, n + shift, dtype};
  }
  Values run() {
    linear({.x = x_.view(),
            .weight = weight_.view(),
            .bias = bias_.view(),
            .y = y_.view(),
            .activation = Activation::gelu_tanh,
            .pre_activation = before_},
           kCuda);
    return y_.values();
  }
  Values before() const {
    Values out(before_.rows, before_.cols);
    for (int64_t i = 0; i < out.rows; ++i)
      for (int64_t j = 0; j < out.cols; ++j)
        out(i, j) = read(before_.row_range(i, 1).columns(j, 1).data, before_.dtype);
    return out;
  }

 private:
  static Values random(int64_t rows, int64_t cols) {
    Random generator(static_cast<uint64_t>(rows + 31 * cols));
    return random_values(rows, cols, generator);
  }
  Tensor x_, weight_, bias_, y_;
  std::vector<float> memory_;
  Matrix before_;
};

std::string device_error(const std::function<void()>& call) { return message_of<DeviceError>(call); }

std::string linear_error() {
  Tensor x(Values(4, 8), DType::bfloat16), weight(Values(16, 8), DType::bfloat16), y(4, 16, DType::bfloat16);
  return device_error([&] { linear({.x = x.view(), .weight = weight.view(), .y = y.view()}, kCuda); });
}

}  // namespace

TEST_CASE(linear_layers) {
  const Fake fake;
  Worst worst;
  check_linear_cases(worst);
  CHECK_EQ(fake.seen.epilogues, 18);  // six products in three types
}

// In every way that cuBLASLt can refuse, the product and GELU are two steps, and it is not asked again.
TEST_CASE(linear_layers_without_epilogues) {
  using Refusal = FakeCublasLt::Refusal;
  int64_t rows = 40;  // other sizes each time: what it has answered is kept
  for (const Refusal refusal : {Refusal::status, Refusal::no_algorithm, Refusal::bad_state, Refusal::at_run}) {
    const Fake fake;
    Kept fused(DType::bfloat16, rows, 16, 24), call(DType::float32, rows, 16, 24);
    const Values wanted = fused.run();
    CHECK(fake.seen.epilogues >= 1);
    fake.seen = {.refuses = refusal};
    const Values got = call.run();
    CHECK_EQ(fake.seen.epilogues, 0);
    CHECK(error(wanted, got) <= bound(DType::bfloat16) &&
          error(fused.before(), call.before()) <= bound(DType::bfloat16));
    CHECK(error(got, naive::map(call.before(), naive::gelu)) <= bound(DType::float32));
    const int asked = fake.seen.heuristics;
    CHECK(identical(call.run(), got));
    CHECK_EQ(fake.seen.heuristics, asked);
    ++rows;
  }
}

TEST_CASE(linear_cases_that_nobody_fuses) {
  const Fake fake;
  fake.seen.refuses = FakeCublasLt::at_run;  // also for what an earlier case has been given an algorithm for
  Worst worst;
  check_linear_cases(worst);
  CHECK_EQ(fake.seen.epilogues, 0);
}

// What NVIDIA demands of the matrix before GELU; anything else is not asked for.
TEST_CASE(alignment_decides) {
  for (const int64_t shift : {0, 8, 1, 4}) {
    const Fake fake;
    Kept call(DType::float16, 50 + shift, 16, 8, shift);
    const Values got = call.run();
    CHECK_EQ(fake.seen.epilogues > 0, shift % 8 == 0);
    CHECK(error(got, naive::map(call.before(), naive::gelu)) <= 2 * bound(DType::float16));
  }
}

TEST_CASE(linear_algorithms_are_measured_on_request) {
  const Fake fake;
  Kept call(DType::float32, 60, 8, 8);
  fake.seen.capturing = true;
  const Values first = call.run();
  CHECK_EQ(fake.seen.last_algorithm, 0);  // as the heuristic says
  fake.seen.capturing = false;
  const int asked = fake.seen.heuristics;
  CHECK(identical(call.run(), first));
  CHECK_EQ(fake.seen.last_algorithm, tunes() ? 7 : 0);  // the fake's last one is its fastest
  CHECK_EQ(fake.seen.heuristics, tunes() ? asked + 1 : asked);
  fake.seen.products = 0;
  CHECK(identical(call.run(), first));
  CHECK_EQ(fake.seen.products, 1);
}

// A sum over no rows is zero, and nothing is nothing.
TEST_CASE(no_rows) {
  const Fake fake;
  for (const DType dtype : kTypes) {
    Tensor weight(Values(3, 5), dtype), grad_weight(3, 5, dtype), grad_bias(1, 3, dtype);
    GuardedBytes workspace(linear_backward_workspace(dtype, 3, 5));
    const Matrix none{nullptr, 0, 5, 5, dtype}, none_out{nullptr, 0, 3, 3, dtype};
    linear({.x = none, .weight = weight.view(), .y = none_out}, kCuda);
    linear_backward({.x = none,
                     .weight = weight.view(),
                     .grad_y = none_out,
                     .grad_x = none,
                     .grad_weight = grad_weight.view(),
                     .grad_bias = grad_bias.view(),
                     .workspace = workspace.data()},
                    kCuda);
    CHECK(identical(grad_weight.values(), Values(3, 5)) && identical(grad_bias.values(), Values(1, 3)));
    CHECK(grad_weight.guards_intact() && workspace.intact());
  }
  CHECK_EQ(fake.seen.products, 0);
}

TEST_CASE(errors) {
  const Fake fake;
  fake.seen.refuses_all = true;
  CHECK_EQ(linear_error(), "linear of [4, 8] and [8, 16] in bfloat16: cuBLASLt has no algorithm for this product");
  fake.seen.refuses_all = false;
  Tensor x(Values(4, 8), DType::float32), weight(Values(16, 8), DType::float32), y(4, 16, DType::float32);
  CHECK_EQ(device_error([&] {
             linear({.x = x.view(), .weight = weight.view(), .y = y.view()},
                    {.device = Device::cuda, .device_index = 3});
           }),
           "linear of [4, 8] and [8, 16] in float32: CUDA says \"invalid device ordinal\"");
}

// Run with FLEXDIT_CUBLASLT naming no library.
TEST_CASE(missing_library) {
  const char* path = std::getenv("FLEXDIT_CUBLASLT");
  if (path && std::string(path).find("/nowhere/") != 0) return;
  const std::string message = linear_error();
  CHECK_NOTE(message.find("linear of [4, 8] and [8, 16] in bfloat16: cuBLASLt could not be loaded (") == 0, message);
  CHECK_NOTE(message.find("pip install nvidia-cublas") != std::string::npos, message);
  CHECK_NOTE(message.find("FLEXDIT_CUBLASLT") != std::string::npos, message);
}
