// The CUDA kernels on the emulator against the CPU's in float64: the cases of op_cases.cpp in all storage types,
// contiguous and strided, with the threads of a block in both orders, which must agree to the bit (no atomics, no
// missing barrier); then buffers with spare rows, wide rows, both ends of the model, selection, and errors.
#include "emulator/emulator.h"
#include "message_of.h"
#include "run_case.h"

using namespace flexdit;
using namespace flexdit::test;

namespace {

const Execution kCuda{.device = Device::cuda};
constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};

void check_case(const OpCase& c, Worst& worst) {
  const Inputs given = inputs_of(c);
  const Result exact = run(c, given, DType::float64, false, {});
  for (const DType dtype : kTypes)
    for (const bool strided : {false, true}) {
      const Result got = run(c, given, dtype, strided, kCuda);
      worst.compare(got, exact, dtype, c);
      emulator::set_order(emulator::Order::backward);
      const Result again = run(c, given, dtype, strided, kCuda);
      emulator::set_order(emulator::Order::forward);
      const std::string name = c.op + " " + c.variant + " in the other order, ";
      check_identical(again.outputs, got.outputs, name + "output");
      check_identical(again.gradients, got.gradients, name + "gradient");
    }
}

void check_cases(const std::vector<OpCase>& cases) {
  Worst worst;
  for (const OpCase& c : cases) check_case(c, worst);
}

// The rows that the layout has are as without spare ones; those behind are zero.
void check_spare(const std::vector<Field>& fields, const std::vector<Values>& got, const std::vector<Values>& wanted,
                 const std::string& name) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i].rows == 0) continue;
    const int64_t rows = wanted[i].rows, spare = got[i].rows - rows;
    CHECK_NOTE(identical(rows_of(got[i], 0, rows), wanted[i]), name, " ", fields[i].name);
    if (spare > 0 && is_field(fields[i]))
      CHECK_NOTE(identical(rows_of(got[i], rows, spare), Values(spare, got[i].cols)), name, " ", fields[i].name,
                 ": spare rows are not zero");
  }
}

// A tensor with random values, and views of it.
Tensor random_tensor(int64_t rows, int64_t cols, DType dtype, Random& random) {
  return Tensor(random_values(rows, cols, random), dtype);
}

std::string error_of(const std::function<void()>& call) { return message_of<ArgumentError>(call); }

}  // namespace

TEST_CASE(linear_layers) { check_cases(linear_cases()); }
TEST_CASE(elementwise) { check_cases(elementwise_cases()); }
TEST_CASE(norms_and_residuals) { check_cases(norm_cases()); }
TEST_CASE(token_exchange) { check_cases(exchange_cases()); }
TEST_CASE(ends_of_the_model) { check_cases(end_cases()); }

TEST_CASE(spare_rows) {
  int checked = 0;
  for (const auto& cases : {norm_cases(), exchange_cases(), end_cases()})
    for (const OpCase& c : cases) {
      const bool ragged = c.variant.rfind("ragged", 0) == 0 || c.variant.rfind("video", 0) == 0;
      if (!ragged || c.variant.find("position") != std::string::npos) continue;
      const Inputs given = inputs_of(c);
      for (const bool strided : {false, true}) {
        const Result exact = run(c, given, DType::bfloat16, strided, kCuda);
        const Result got = run(c, given, DType::bfloat16, strided, kCuda, 13);
        check_spare(c.outputs, got.outputs, exact.outputs, c.op + " " + c.variant);
        check_spare(c.inputs, got.gradients, exact.gradients, c.op + "_backward " + c.variant);
      }
      ++checked;
    }
  CHECK(checked >= 30);
}

// Several blocks share a sample's tokens; to the bit its mean and gradients are those that it has alone.
TEST_CASE(means_do_not_depend_on_company) {
  const std::vector<Grid> grids = {{1, 1, 1}, {1, 16, 16}, {1, 3, 5}, {1, 4, 4}, {1, 1, 17}, {2, 13, 16}, {1, 1, 16}};
  for (const DType dtype : kTypes)
    for (const int64_t c : {72, 7}) {
      const auto compute = [&](const std::vector<Values>& in, const std::vector<Grid>& samples) {
        const HostLayout owner(samples);
        const TokenLayout layout = owner.view();
        const int64_t rows = layout.total() + 5, b = layout.batch;
        Tensor x(rows, c, dtype), shift(in[1], dtype), scale(in[2], dtype), grad(in[3], dtype), mean(b, c, dtype);
        Tensor grad_x(rows, c, dtype), grad_shift(b, c, dtype), grad_scale(b, c, dtype);
        x.fill(in[0]);
        GuardedBytes workspace(modulated_mean_workspace(dtype, b, rows, c));
        ModulatedMean p{.x = x.view(), .shift = shift.view(), .scale = scale.view(), .layout = layout};
        p.mean = mean.view(), p.workspace = workspace.data();
        modulated_mean(p, kCuda);
        ModulatedMeanBackward q{.x = x.view(), .scale = scale.view(), .layout = layout, .grad_mean = grad.view()};
        q.grad_x = grad_x.view(), q.grad_shift = grad_shift.view(), q.grad_scale = grad_scale.view();
        q.workspace = workspace.data();
        modulated_mean_backward(q, kCuda);
        CHECK(workspace.intact() && mean.guards_intact() && grad_scale.guards_intact());
        return std::vector{mean.values(), grad_shift.values(), grad_scale.values(),
                           rows_of(grad_x.values(), 0, layout.total())};
      };
      Random random(7);
      const auto samples = static_cast<int64_t>(grids.size());
      std::vector<Values> in = {random_values(naive::total(grids), c, random)};
      for (int i = 0; i < 3; ++i) in.push_back(random_values(samples, c, random));
      const auto together = compute(in, grids);
      int64_t row = 0;
      for (int64_t b = 0; b < samples; row += grids[size_t(b++)].tokens()) {
        const int64_t tokens = grids[size_t(b)].tokens();
        const auto alone =
            compute({rows_of(in[0], row, tokens), rows_of(in[1], b, 1), rows_of(in[2], b, 1), rows_of(in[3], b, 1)},
                    {grids[size_t(b)]});
        for (size_t i = 0; i < alone.size(); ++i)
          CHECK_NOTE(identical(alone[i], rows_of(together[i], i < 3 ? b : row, i < 3 ? 1 : tokens)), name_of(dtype),
                     " sample ", b, " result ", i);
      }
    }
}

// Without samples all rows are spare: whatever writes token rows clears them.
TEST_CASE(spare_rows_of_no_samples) {
  const HostLayout owner(std::span<const Grid>{});
  const TokenLayout none = owner.view();
  const int64_t rows = 13;
  for (const int64_t c : {48, 7}) {
    Random random(6);
    Tensor x = random_tensor(rows, c, DType::bfloat16, random), empty(0, c, DType::bfloat16);
    GuardedBytes workspace(modulated_mean_workspace(DType::bfloat16, 0, rows, c));
    const auto check = [&](const char* name, const std::function<void(const Matrix&)>& call) {
      Tensor written(rows, c, DType::bfloat16, true);
      call(written.view());
      CHECK_NOTE(identical(written.values(), Values(rows, c)) && written.guards_intact(), name, " with C=", c);
    };
    const Matrix vectors = empty.view(), in = x.view();
    check("modulated_layer_norm", [&](const Matrix& out) {
      modulated_layer_norm({.x = in, .shift = vectors, .scale = vectors, .layout = none, .y = out}, kCuda);
    });
    check("modulated_layer_norm_backward", [&](const Matrix& out) {
      ModulatedLayerNormBackward p{.x = in, .scale = vectors, .layout = none, .grad_y = in, .grad_residual = in};
      p.grad_x = out, p.grad_shift = p.grad_scale = vectors, p.workspace = workspace.data();
      modulated_layer_norm_backward(p, kCuda);
    });
    check("gated_residual", [&](const Matrix& out) {
      gated_residual({.x = in, .y = in, .gate = vectors, .layout = none, .out = out}, kCuda);
    });
    check("gated_residual_backward", [&](const Matrix& out) {
      GatedResidualBackward p{.y = in, .gate = vectors, .layout = none, .grad_out = in, .grad_y = out};
      p.grad_gate = vectors;
      gated_residual_backward(p, kCuda);
    });
    check("modulated_mean_backward", [&](const Matrix& out) {
      ModulatedMeanBackward p{.x = in, .scale = vectors, .layout = none, .grad_mean = vectors, .grad_residual = {}};
      p.grad_x = out, p.grad_shift = p.grad_scale = vectors, p.workspace = workspace.data();
      modulated_mean_backward(p, kCuda);
    });
    check("pool_tokens", [&](const Matrix& out) {
      pool_tokens({.x = vectors, .position = {}, .layout = none, .sparse_layout = none, .out = out}, kCuda);
    });
    check("pool_tokens_backward", [&](const Matrix& out) {
      pool_tokens_backward({.layout = none, .sparse_layout = none, .grad_out = in, .grad_x = out}, kCuda);
    });
    check("gather_sparse", [&](const Matrix& out) {
      gather_sparse({.s = in, .x = in, .position = {}, .layout = none, .sparse_layout = none, .out = out}, kCuda);
    });
    check("gather_sparse_backward", [&](const Matrix& out) {
      gather_sparse_backward({.layout = none, .sparse_layout = none, .grad_out = in, .grad_s = out}, kCuda);
    });
    CHECK(workspace.intact());
  }
}

// With a row map and with a search results are the same to the bit; and the map is what is read, if there is one.
TEST_CASE(row_maps_and_searches) {
  for (const auto& cases : {norm_cases(), exchange_cases(), end_cases()})
    for (const OpCase& c : cases) {
      const Inputs given = inputs_of(c);
      const Result mapped = run(c, given, DType::bfloat16, false, kCuda);
      row_maps = false;
      const Result searched = run(c, given, DType::bfloat16, false, kCuda);
      row_maps = true;
      check_identical(searched.outputs, mapped.outputs, c.op + " " + c.variant + " output");
      check_identical(searched.gradients, mapped.gradients, c.op + " " + c.variant + " gradient");
    }
  Random random(8);
  Tensor x = random_tensor(6, 8, DType::float32, random), vectors = random_tensor(2, 8, DType::float32, random);
  const HostLayout layout(2, Grid{1, 1, 3});
  TokenLayout other = layout.view();
  const int32_t exchanged[] = {1, 1, 1, 0, 0, 0};
  other.row_map = exchanged;
  for (const Execution& exec : {kCuda, Execution{}}) {
    const auto gated = [&](const TokenLayout& l) {
      Tensor out(6, 8, DType::float32);
      gated_residual({.x = x.view(), .y = x.view(), .gate = vectors.view(), .layout = l, .out = out.view()}, exec);
      return out.values();
    };
    CHECK(!identical(gated(other), gated(layout.view())));
  }
}

// Many tokens in one storage type only: the emulator takes a second for them.
TEST_CASE(sizes_of_models) {
  Worst worst;
  for (const OpCase& c : model_size_cases()) {
    const Inputs given = inputs_of(c);
    const Result exact = run(c, given, DType::float64, false, {});
    for (const DType dtype : kTypes)
      if (dtype == DType::bfloat16 || c.variant.rfind("many", 0) != 0)
        worst.compare(run(c, given, dtype, dtype == DType::float16, kCuda), exact, dtype, c);
  }
}

TEST_CASE(nothing_to_do) {
  Worst worst;
  for (const OpCase& c : empty_cases()) {
    const Inputs given = inputs_of(c);
    const Result exact = run(c, given, DType::float64, false, {});
    for (const DType dtype : kTypes) worst.compare(run(c, given, dtype, false, kCuda), exact, dtype, c);
  }
}

TEST_CASE(timesteps) {
  const std::vector<double> t = {0, 1, 17.5, 499, 999, 1000};
  const auto compute = [&](DType dtype, const Execution& exec) {
    Tensor out(6, 256, dtype, true);
    timestep_embedding({.t = t.data(), .out = out.view()}, exec);
    CHECK(out.guards_intact());
    return out.values();
  };
  const Values exact = compute(DType::float32, {});
  CHECK(identical(compute(DType::float32, kCuda), exact));
  CHECK(identical(compute(DType::bfloat16, kCuda), compute(DType::bfloat16, {})));
  CHECK(error(compute(DType::float16, kCuda), exact) <= bound(DType::float16));
}

TEST_CASE(labels_outside_the_table) {
  const std::vector<int64_t> labels = {1, 11, -1};
  Random random(3);
  Tensor table = random_tensor(11, 5, DType::float32, random), x = random_tensor(3, 5, DType::float32, random);
  label_embedding({.labels = labels.data(), .table = table.view(), .x = x.view()}, kCuda);
  const Values got = x.values();
  CHECK(!std::isnan(got(0, 0)) && std::isnan(got(1, 0)) && std::isnan(got(2, 4)));
}

TEST_CASE(selection) {
  Random random(4);
  const DensitySchedule schedules[] = {
      DensitySchedule({{1, 10, 10}, {1, 8, 8}, {1, 7, 7}, {1, 6, 6}}), DensitySchedule({{2, 3, 4}}, 50),
      DensitySchedule::continuous(0.5, 0.9, {1, 32, 32}), DensitySchedule({{3, 2, 1}, {1, 1, 1}}, {0, 7}, 1000)};
  for (const DensitySchedule& schedule : schedules)
    for (const int64_t batch : {0, 1, 5, 32, 255, 256, 257, 700}) {
      std::vector<double> t;
      for (int64_t b = 0; b < batch; ++b) {
        const auto begin = schedule.begins()[size_t(random.below(int64_t(schedule.begins().size())))];
        const double anywhere = double(random.below(schedule.num_timesteps() * 4 + 1)) / 4;
        t.push_back(b % 3 == 0 ? double(begin) : b % 3 == 1 ? std::nextafter(double(begin), 0) : anywhere);
      }
      std::vector<LayoutRow> got(size_t(batch + 2), {-1, {-1, -1, -1}}), wanted = got;
      SelectTokens p{.t = t.data(), .batch = batch, .schedule = &schedule, .table = wanted.data()};
      select_tokens(p, {});
      const TokenLayout layout{wanted.data(), batch};
      for (const bool maps : {false, true}) {
        const int64_t spare[] = {-7, 0, 300};  // fewer rows than there are: the map ends with them
        std::vector<int32_t> map(size_t(std::max<int64_t>(layout.total() + spare[batch % 3], 0)) + 1, -7);
        p.table = got.data(), p.row_map = maps ? map.data() : nullptr, p.rows = int64_t(map.size()) - 1;
        select_tokens(p, kCuda);
        for (size_t b = 0; b < got.size(); ++b)
          CHECK_NOTE(got[b].offset == wanted[b].offset && got[b].grid == wanted[b].grid, "batch ", batch, " sample ",
                     b);
        for (int64_t r = 0; maps && r < p.rows; ++r)
          CHECK_NOTE(map[size_t(r)] == layout.search(r), "batch ", batch, " row ", r, ": ", map[size_t(r)]);
        CHECK_EQ(map.back(), -7);
      }
    }
  const std::vector<double> odd = {-1, 2000, NAN};
  LayoutRow table[4];
  select_tokens({.t = odd.data(), .batch = 3, .schedule = &schedules[0], .table = table}, kCuda);
  CHECK((table[0].grid == Grid{1, 10, 10}) && (table[1].grid == Grid{1, 6, 6}) && (table[2].grid == Grid{1, 10, 10}));
  CHECK_EQ(table[3].offset, 236);
}

// A bias's gradient over many rows is summed in chunks, in the workspace.
TEST_CASE(column_sums_in_chunks) {
  Random random(5);
  const Values x = random_values(1100, 8, random), g = random_values(1100, 40, random),
               w = random_values(40, 8, random);
  const auto compute = [&](DType dtype, const Execution& exec) {
    Tensor tx(x, dtype), tg(g, dtype), tw(w, dtype), grad_weight(40, 8, dtype), grad_bias(1, 40, dtype);
    GuardedBytes workspace(linear_backward_workspace(dtype, 40, 8));
    linear_backward({.x = tx.view(),
                     .weight = tw.view(),
                     .grad_y = tg.view(),
                     .grad_x = {},
                     .grad_weight = grad_weight.view(),
                     .grad_bias = grad_bias.view(),
                     .workspace = workspace.data()},
                    exec);
    CHECK(workspace.intact());
    return grad_bias.values();
  };
  const Values exact = compute(DType::float64, {});
  for (const DType dtype : kTypes) CHECK(error(compute(dtype, kCuda), exact) <= bound(dtype));
}

TEST_CASE(errors) {
  Tensor doubles(4, 8, DType::float64), halves(4, 8, DType::float16), wide(4, 1540, DType::float32);
  const auto gelu_of = [](Tensor& t, const Execution& exec) {
    return error_of([&] { gelu({.x = t.view(), .y = t.view()}, exec); });
  };
  CHECK_EQ(gelu_of(doubles, kCuda), "gelu: x is float64, which the CUDA backend does not compute with");
  CHECK_EQ(gelu_of(halves, {}), "gelu: x is float16, which the CPU backend does not compute with");
  const HostLayout layout(4, Grid{1, 1, 1});
  const auto wide_norm = [&] {
    modulated_layer_norm(
        {.x = wide.view(), .shift = wide.view(), .scale = wide.view(), .layout = layout.view(), .y = wide.view()},
        kCuda);
  };
  CHECK_EQ(error_of(wide_norm), "modulated_layer_norm: rows have 1540 columns, the CUDA backend takes at most 1536");

  std::vector<Grid> grids;
  for (int i = 1; i <= 65; ++i) grids.push_back({1, 1, i});
  const DensitySchedule many(grids), huge({{1, 1 << 15, 1 << 15}});
  std::vector<LayoutRow> table(5);
  const std::vector<double> t = {1, 2, 3, 4};
  std::vector<int32_t> map(3);
  const DensitySchedule single({{1, 1, 1}});
  CHECK_EQ(
      error_of([&] {
        select_tokens(
            {.t = t.data(), .batch = 4, .schedule = &single, .table = table.data(), .row_map = map.data(), .rows = 3},
            {});
      }),
      "select_tokens: rows is 3, must be at least the 4 tokens of the layout");
  const auto select = [&](const DensitySchedule& schedule) {
    return error_of(
        [&] { select_tokens({.t = t.data(), .batch = 4, .schedule = &schedule, .table = table.data()}, kCuda); });
  };
  CHECK_EQ(select(many), "select_tokens: schedule has 65 segments, the CUDA backend takes at most 64");
  CHECK_NOTE(select(huge).find("2^31 - 1") != std::string::npos, select(huge));

  const int64_t batch = 70000;  // more than a grid's second side can have
  const HostLayout many_samples(batch, Grid{1, 1, 1});
  Tensor rows(batch, 1, DType::float32), vectors(batch, 1, DType::float32);
  const auto message = message_of<DeviceError>([&] {
    gated_residual_backward({.y = rows.view(),
                             .gate = vectors.view(),
                             .layout = many_samples.view(),
                             .grad_out = rows.view(),
                             .grad_y = rows.view(),
                             .grad_gate = vectors.view()},
                            kCuda);
  });
  CHECK_NOTE(message.find("gated_residual_backward on [70000, 1]: CUDA says \"invalid configuration argument\"") == 0,
             message);
}
