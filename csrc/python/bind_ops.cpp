// The public operations. Outputs are allocated by the caller; None stands for an empty view.
#include "python/tensors.h"

namespace flexdit::python {
namespace {

// Runs an operation without the interpreter's lock.
template <class Parameters>
void run(void (*op)(const Parameters&, const Execution&), const Parameters& p, const Execution& exec) {
  const py::gil_scoped_release release;
  op(p, exec);
}

void bind_norm(py::module_& m) {
  m.def("modulated_layer_norm",
        [](py::object x, py::object shift, py::object scale, py::object table, double eps, py::object y, const Execution& exec) {
          run(modulated_layer_norm,
              ModulatedLayerNorm{.x = matrix(x),
                                 .shift = matrix(shift),
                                 .scale = matrix(scale),
                                 .layout = layout(table),
                                 .y = matrix(y),
                                 .eps = eps},
              exec);
          clear_spare_rows(matrix(y), layout(table), exec);
        });
  m.def("modulated_layer_norm_backward",
        [](py::object x, py::object scale, py::object table, double eps, py::object grad_y, py::object grad_x,
           py::object grad_shift, py::object grad_scale, py::object workspace, const Execution& exec) {
          run(modulated_layer_norm_backward,
              ModulatedLayerNormBackward{.x = matrix(x),
                                         .scale = matrix(scale),
                                         .layout = layout(table),
                                         .grad_y = matrix(grad_y),
                                         .grad_x = matrix(grad_x),
                                         .grad_shift = matrix(grad_shift),
                                         .grad_scale = matrix(grad_scale),
                                         .eps = eps,
                                         .workspace = pointer<void>(workspace)},
              exec);
          clear_spare_rows(matrix(grad_x), layout(table), exec);
        });
  m.def("gated_residual",
        [](py::object x, py::object y, py::object gate, py::object table, py::object out, const Execution& exec) {
          run(gated_residual,
              GatedResidual{
                  .x = matrix(x), .y = matrix(y), .gate = matrix(gate), .layout = layout(table), .out = matrix(out)},
              exec);
          clear_spare_rows(matrix(out), layout(table), exec);
        });
  m.def("gated_residual_backward", [](py::object y, py::object gate, py::object table, py::object grad_out,
                                      py::object grad_y, py::object grad_gate, const Execution& exec) {
    run(gated_residual_backward,
        GatedResidualBackward{.y = matrix(y),
                              .gate = matrix(gate),
                              .layout = layout(table),
                              .grad_out = matrix(grad_out),
                              .grad_y = matrix(grad_y),
                              .grad_gate = matrix(grad_gate)},
        exec);
    clear_spare_rows(matrix(grad_y), layout(table), exec);
  });
  m.def("modulated_mean", [](py::object x, py::object shift, py::object scale, py::object table, double eps,
                             py::object mean, py::object workspace, const Execution& exec) {
    run(modulated_mean,
        ModulatedMean{.x = matrix(x),
                      .shift = matrix(shift),
                      .scale = matrix(scale),
                      .layout = layout(table),
                      .mean = matrix(mean),
                      .eps = eps,
                      .workspace = pointer<void>(workspace)},
        exec);
  });
  m.def("modulated_mean_backward",
        [](py::object x, py::object scale, py::object table, double eps, py::object grad_mean, py::object grad_x,
           py::object grad_shift, py::object grad_scale, py::object workspace, const Execution& exec) {
          run(modulated_mean_backward,
              ModulatedMeanBackward{.x = matrix(x),
                                    .scale = matrix(scale),
                                    .layout = layout(table),
                                    .grad_mean = matrix(grad_mean),
                                    .grad_x = matrix(grad_x),
                                    .grad_shift = matrix(grad_shift),
                                    .grad_scale = matrix(grad_scale),
                                    .eps = eps,
                                    .workspace = pointer<void>(workspace)},
              exec);
          clear_spare_rows(matrix(grad_x), layout(table), exec);
        });
  m.def("modulated_mean_workspace", [](py::object x, py::object table) {
    const Matrix m = matrix(x);
    return modulated_mean_workspace(m.dtype, layout(table).batch, m.rows, m.cols);
  });
  m.def("row_statistics_workspace", [](py::object x) { return row_statistics_workspace(dtype_of(x), matrix(x).rows); });
}

void bind_tokens(py::module_& m) {
  m.def("pool_tokens",
        [](py::object x, py::object position, py::object table, py::object sparse, py::object out, const Execution& exec) {
          run(pool_tokens,
              PoolTokens{.x = matrix(x),
                         .position = matrix(position),
                         .layout = layout(table),
                         .sparse_layout = layout(sparse),
                         .out = matrix(out)},
              exec);
          clear_spare_rows(matrix(out), layout(sparse), exec);
        });
  m.def("pool_tokens_backward",
        [](py::object table, py::object sparse, py::object grad_out, py::object grad_x, const Execution& exec) {
          run(pool_tokens_backward,
              PoolTokensBackward{.layout = layout(table),
                                 .sparse_layout = layout(sparse),
                                 .grad_out = matrix(grad_out),
                                 .grad_x = matrix(grad_x)},
              exec);
          clear_spare_rows(matrix(grad_x), layout(table), exec);
        });
  m.def("gather_sparse",
        [](py::object s, py::object x, py::object table, py::object sparse, py::object out, const Execution& exec) {
          run(gather_sparse,
              GatherSparse{.s = matrix(s),
                           .x = matrix(x),
                           .layout = layout(table),
                           .sparse_layout = layout(sparse),
                           .out = matrix(out)},
              exec);
          clear_spare_rows(matrix(out), layout(table), exec);
        });
  m.def("gather_sparse_backward",
        [](py::object table, py::object sparse, py::object grad_out, py::object grad_s, const Execution& exec) {
          run(gather_sparse_backward,
              GatherSparseBackward{.layout = layout(table),
                                   .sparse_layout = layout(sparse),
                                   .grad_out = matrix(grad_out),
                                   .grad_s = matrix(grad_s)},
              exec);
          clear_spare_rows(matrix(grad_s), layout(sparse), exec);
        });
  m.def("select_tokens", [](py::object t, const DensitySchedule& schedule, py::object table, const Execution& exec) {
    const TokenLayout written = layout(table);
    const auto slices = written.row_map ? table.attr("shape").cast<std::vector<int64_t>>()[0] - 1 : 0;
    run(select_tokens,
        SelectTokens{.t = pointer<const double>(t),
                     .batch = written.batch,
                     .schedule = &schedule,
                     .table = const_cast<LayoutRow*>(written.table),
                     .row_map = const_cast<int32_t*>(written.row_map),
                     .rows = slices * 4 * (written.batch + 1)},
        exec);
  });
}

void bind_guidance(py::module_& m) {
  m.def("guidance_combine",
        [](py::object images, int64_t channels, int64_t guided_channels, double scale, const Execution& exec) {
          run(guidance_combine,
              GuidanceCombine{
                  .images = matrix(images), .channels = channels, .guided_channels = guided_channels, .scale = scale},
              exec);
        });
}

void bind_attention(py::module_& m) {
  m.def("attention", [](py::object q, py::object k, py::object v, int64_t num_heads, py::object table_q,
                        py::object table_k, bool across_frames, int64_t max_positions, py::object out, py::object lse,
                        const Execution& exec) {
    run(attention,
        Attention{.q = matrix(q),
                  .k = matrix(k),
                  .v = matrix(v),
                  .layout_q = layout(table_q),
                  .layout_k = layout(table_k),
                  .num_heads = num_heads,
                  .out = matrix(out),
                  .lse = matrix(lse),
                  .across_frames = across_frames,
                  .max_positions = max_positions},
        exec);
    clear_spare_rows(matrix(out), layout(table_q), exec);
    clear_spare_rows(matrix(lse), layout(table_q), exec);
  });
  m.def("attention_backward", [](py::object q, py::object k, py::object v, int64_t num_heads, py::object table_q,
                                 py::object table_k, bool across_frames, int64_t max_positions, py::object out,
                                 py::object lse, py::object grad_out,
                                 py::object grad_q, py::object grad_k, py::object grad_v, const Execution& exec) {
    AttentionBackward p;
    p.q = matrix(q), p.k = matrix(k), p.v = matrix(v), p.out = matrix(out), p.lse = matrix(lse);
    p.layout_q = layout(table_q), p.layout_k = layout(table_k), p.num_heads = num_heads;
    p.across_frames = across_frames, p.max_positions = max_positions;
    p.grad_out = matrix(grad_out);
    p.grad_q = matrix(grad_q), p.grad_k = matrix(grad_k), p.grad_v = matrix(grad_v);
    run(attention_backward, p, exec);
    clear_spare_rows(p.grad_q, p.layout_q, exec);
    clear_spare_rows(p.grad_k, p.layout_k, exec);
    clear_spare_rows(p.grad_v, p.layout_k, exec);
  });
}

void bind_linear(py::module_& m) {
  m.def("linear", [](py::object x, py::object weight, py::object bias, py::object y, const Execution& exec) {
    run(linear, Linear{.x = matrix(x), .weight = matrix(weight), .bias = matrix(bias), .y = matrix(y)}, exec);
  });
  m.def("linear_backward", [](py::object x, py::object weight, py::object grad_y, py::object grad_x,
                              py::object grad_weight, py::object grad_bias, py::object workspace, const Execution& exec) {
    run(linear_backward,
        LinearBackward{.x = matrix(x),
                       .weight = matrix(weight),
                       .grad_y = matrix(grad_y),
                       .grad_x = matrix(grad_x),
                       .grad_weight = matrix(grad_weight),
                       .grad_bias = matrix(grad_bias),
                       .workspace = pointer<void>(workspace)},
        exec);
  });
  m.def("linear_backward_workspace", [](py::object weight) {
    const Matrix w = matrix(weight);
    return linear_backward_workspace(w.dtype, w.rows, w.cols);
  });
}

}  // namespace

void bind_ops(py::module_& m) {
  bind_norm(m);
  bind_tokens(m);
  bind_attention(m);
  bind_linear(m);
  bind_guidance(m);
}

}  // namespace flexdit::python
