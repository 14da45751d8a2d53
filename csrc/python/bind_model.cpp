// Blocks, the model's two ends, and the whole model.
#include "python/tensors.h"

namespace flexdit::python {
namespace {

// Token rows of a call: on the CPU the packed ones only, on a GPU all, whose number the host knows.
Matrix token_rows(py::handle tensor, const TokenLayout& layout, const Execution& exec) {
  return tensor.is_none() || exec.device != Device::cpu ? matrix(tensor) : matrix_rows(tensor, layout.total());
}

// The fields that a block's forward and backward share.
BlockForward block_fields(BlockKind kind, const std::vector<Matrix>& parameters, int64_t num_heads, py::handle x,
                          py::handle other, py::handle condition, py::handle table, py::handle other_table,
                          double mlp_norm_eps, const Execution& exec) {
  BlockForward p;
  p.layout = layout(table), p.other_layout = layout(other_table);
  p.x = token_rows(x, p.layout, exec);
  p.other = token_rows(other, p.other_layout, exec);
  p.condition = matrix(condition);
  p.parameters = parameters;
  p.mlp_norm_eps = mlp_norm_eps;
  if (parameters.size() < 4) throw ArgumentError("parameters holds too few tensors for a block");
  const Matrix& fc2 = parameters[parameters.size() - 2];
  p.shape = {.kind = kind,
             .hidden = p.x.cols,
             .mlp_hidden = fc2.cols,
             .num_heads = num_heads,
             .batch = p.layout.batch,
             .rows = p.x.rows,
             .other_rows = p.other.rows,
             .dtype = p.x.dtype};
  return p;
}

void bind_blocks(py::module_& m) {
  py::enum_<BlockKind>(m, "BlockKind", py::module_local())
      .value("pooling", BlockKind::pooling)
      .value("dense", BlockKind::dense)
      .value("generation", BlockKind::generation)
      .value("recovery", BlockKind::recovery);
  m.def("block_parameters", [](BlockKind kind, int64_t hidden, int64_t mlp_hidden) {
    std::vector<std::string> names;
    for (const auto& spec : block_parameters(kind, hidden, mlp_hidden)) names.push_back(spec.name);
    return names;
  });
  m.def("block_bytes", [](BlockKind kind, int64_t hidden, int64_t mlp_hidden, int64_t num_heads, int64_t batch,
                          int64_t rows, int64_t other_rows, py::object like) {
    const BlockShape shape{kind, hidden, mlp_hidden, num_heads, batch, rows, other_rows, dtype_of(like)};
    return py::make_tuple(block_context_bytes(shape), block_workspace_bytes(shape, false),
                          block_workspace_bytes(shape, true), block_backward_workspace_bytes(shape));
  });
  m.def("block_forward",
        [](BlockKind kind, const py::sequence& parameters, int64_t num_heads, py::object x, py::object other,
           py::object condition, py::object position, py::object table, py::object other_table, double mlp_norm_eps,
           py::object out, py::object context, py::object workspace, const Execution& exec) {
          const auto list = matrices(parameters);
          BlockForward p =
              block_fields(kind, list, num_heads, x, other, condition, table, other_table, mlp_norm_eps, exec);
          p.position = matrix(position);
          p.out = token_rows(out, p.layout, exec);
          p.context = pointer<void>(context), p.workspace = pointer<void>(workspace);
          {
            const py::gil_scoped_release release;
            block_forward(p, exec);
          }
          clear_spare_rows(matrix(out), p.layout, exec);
        });
  m.def("block_backward",
        [](BlockKind kind, const py::sequence& parameters, int64_t num_heads, py::object x, py::object other,
           py::object condition, py::object table, py::object other_table, double mlp_norm_eps, py::object context,
           py::object grad_out, py::object grad_x, py::object grad_other, py::object grad_condition, const py::sequence& grad_parameters,
           py::object workspace, const Execution& exec) {
          const auto list = matrices(parameters), grads = matrices(grad_parameters);
          BlockBackward p;
          static_cast<BlockForward&>(p) =
              block_fields(kind, list, num_heads, x, other, condition, table, other_table, mlp_norm_eps, exec);
          p.context = pointer<void>(context), p.workspace = pointer<void>(workspace);
          p.grad_out = token_rows(grad_out, p.layout, exec), p.grad_x = token_rows(grad_x, p.layout, exec);
          p.grad_other = token_rows(grad_other, p.other_layout, exec);
          p.grad_condition = matrix(grad_condition);
          p.grad_parameters = grads;
          {
            const py::gil_scoped_release release;
            block_backward(p, exec);
          }
          clear_spare_rows(matrix(grad_x), p.layout, exec);
          clear_spare_rows(matrix(grad_other), p.other_layout, exec);
        });
}

// What a block in PixArt's style has besides: Python's (attention_table, across_frames, max_positions, caption,
// caption_table), tables and caption None where there are none. The condition is the modulation.
void add_style(BlockForward& p, const py::tuple& style, const Execution& exec) {
  p.shape.style.shared_modulation = true;
  p.attention_layout = layout(style[0]);
  p.across_frames = style[1].cast<bool>(), p.max_positions = style[2].cast<int64_t>();
  if (style[3].is_none()) return;
  p.shape.style.caption = true;
  p.caption_layout = layout(style[4]);
  p.caption = token_rows(style[3], p.caption_layout, exec);
  p.shape.caption_rows = p.caption.rows;
}

void bind_single_blocks(py::module_& m) {
  m.def("single_block_parameters", [](BlockKind kind, int64_t hidden, int64_t mlp_hidden, bool caption) {
    std::vector<std::string> names;
    for (const auto& spec : block_parameters(kind, hidden, mlp_hidden, {true, caption})) names.push_back(spec.name);
    return names;
  });
  m.def("single_block_bytes", [](BlockKind kind, int64_t hidden, int64_t mlp_hidden, int64_t num_heads, int64_t batch,
                                 int64_t rows, int64_t other_rows, bool caption, int64_t caption_rows, py::object like) {
    const BlockShape shape{kind,       hidden,         mlp_hidden,      num_heads,   batch, rows,
                           other_rows, dtype_of(like), {true, caption}, caption_rows};
    return py::make_tuple(block_context_bytes(shape), block_workspace_bytes(shape, false),
                          block_workspace_bytes(shape, true), block_backward_workspace_bytes(shape));
  });
  m.def("single_block_forward",
        [](BlockKind kind, const py::sequence& parameters, int64_t num_heads, py::object x, py::object other,
           py::object modulation, py::object table, py::object other_table, const py::tuple& style, py::object out,
           py::object context, py::object workspace, const Execution& exec) {
          const auto list = matrices(parameters);
          BlockForward p =
              block_fields(kind, list, num_heads, x, other, modulation, table, other_table, kLayerNormEps, exec);
          add_style(p, style, exec);
          p.out = token_rows(out, p.layout, exec);
          p.context = pointer<void>(context), p.workspace = pointer<void>(workspace);
          {
            const py::gil_scoped_release release;
            block_forward(p, exec);
          }
          clear_spare_rows(matrix(out), p.layout, exec);
        });
  m.def("single_block_backward",
        [](BlockKind kind, const py::sequence& parameters, int64_t num_heads, py::object x, py::object other,
           py::object modulation, py::object table, py::object other_table, const py::tuple& style, py::object context,
           py::object grad_out, py::object grad_x, py::object grad_other, py::object grad_modulation,
           py::object grad_caption, const py::sequence& grad_parameters, py::object workspace, const Execution& exec) {
          const auto list = matrices(parameters), grads = matrices(grad_parameters);
          BlockBackward p;
          static_cast<BlockForward&>(p) =
              block_fields(kind, list, num_heads, x, other, modulation, table, other_table, kLayerNormEps, exec);
          add_style(p, style, exec);
          p.context = pointer<void>(context), p.workspace = pointer<void>(workspace);
          p.grad_out = token_rows(grad_out, p.layout, exec), p.grad_x = token_rows(grad_x, p.layout, exec);
          p.grad_other = token_rows(grad_other, p.other_layout, exec);
          p.grad_condition = matrix(grad_modulation);
          if (p.shape.style.caption) p.grad_caption = token_rows(grad_caption, p.caption_layout, exec);
          p.grad_parameters = grads;
          {
            const py::gil_scoped_release release;
            block_backward(p, exec);
          }
          clear_spare_rows(matrix(grad_x), p.layout, exec);
          clear_spare_rows(matrix(grad_other), p.other_layout, exec);
          clear_spare_rows(matrix(grad_caption), p.caption_layout, exec);
        });
}

void bind_ends(py::module_& m) {
  py::class_<Patches>(m, "Patches", py::module_local())
      .def(py::init(
               [](int64_t channels, int64_t patch, bool channels_last) {
                 return Patches{.channels = channels, .patch = patch, .channels_last = channels_last};
               }),
           py::arg("channels"), py::arg("patch"), py::arg("channels_last"));
  m.def("final_layer_workspace", [](py::object x, int64_t batch, int64_t patch_values) {
    const Matrix view = matrix(x);
    return final_layer_workspace_bytes(batch, view.rows, view.cols, patch_values, view.dtype);
  });
  m.def("final_layer_forward", [](const py::sequence& parameters, py::object x, py::object condition, py::object table,
                                  py::object rows, Patches image, py::object out, py::object workspace, const Execution& exec) {
    const auto list = matrices(parameters);
    image.image = pointer<void>(out), image.rows = matrix(rows), image.layout = layout(table);
    const FinalLayerForward p{.parameters = list,
                              .layout = layout(table),
                              .x = matrix(x),
                              .condition = matrix(condition),
                              .out = image.rows,
                              .workspace = pointer<void>(workspace)};
    const py::gil_scoped_release release;
    final_layer_forward(p, exec);
    unpatchify(image, exec);
  });
  m.def("final_layer_backward",
        [](const py::sequence& parameters, py::object x, py::object condition, py::object table, py::object rows,
           Patches image, py::object grad_out, py::object grad_x, py::object grad_condition,
           const py::sequence& grad_parameters, py::object workspace, const Execution& exec) {
          const auto list = matrices(parameters), grads = matrices(grad_parameters);
          image.image = pointer<void>(grad_out), image.rows = matrix(rows), image.layout = layout(table);
          FinalLayerBackward p;
          p.parameters = list, p.layout = layout(table), p.x = matrix(x), p.condition = matrix(condition);
          p.workspace = pointer<void>(workspace);
          p.grad_out = image.rows, p.grad_x = matrix(grad_x), p.grad_condition = matrix(grad_condition);
          p.grad_parameters = grads;
          const py::gil_scoped_release release;
          patchify(image, exec);
          final_layer_backward(p, exec);
        });
  m.def("timestep_embedding", [](py::object t, int64_t shift, py::object out, const Execution& exec) {
    const TimestepEmbedding p{.t = pointer<const double>(t), .out = matrix(out), .shift = shift};
    const py::gil_scoped_release release;
    timestep_embedding(p, exec);
  });
  m.def("condition_workspace", [](py::object features, int64_t hidden) {
    const Matrix view = matrix(features);
    return condition_workspace_bytes(view.rows, hidden, view.cols, view.dtype);
  });
  m.def("condition_forward", [](const py::sequence& parameters, py::object features, py::object labels, py::object out,
                                py::object workspace, const Execution& exec) {
    const auto list = matrices(parameters);
    const ConditionForward p{.parameters = list,
                             .features = matrix(features),
                             .labels = pointer<int64_t>(labels),
                             .out = matrix(out),
                             .workspace = pointer<void>(workspace)};
    const py::gil_scoped_release release;
    condition_forward(p, exec);
  });
  m.def("condition_backward",
        [](const py::sequence& parameters, py::object features, py::object labels, py::object grad_out,
           const py::sequence& grad_parameters, py::object workspace, const Execution& exec) {
          const auto list = matrices(parameters), grads = matrices(grad_parameters);
          ConditionBackward p;
          p.parameters = list, p.features = matrix(features), p.labels = pointer<int64_t>(labels);
          p.workspace = pointer<void>(workspace);
          p.grad_out = matrix(grad_out), p.grad_parameters = grads;
          const py::gil_scoped_release release;
          condition_backward(p, exec);
        });
  m.def("patch_embed_workspace", [](py::object rows, int64_t hidden) {
    const Matrix view = matrix(rows);
    return patch_embed_backward_workspace_bytes(view.rows, hidden, view.cols, view.dtype);
  });
  m.def("patch_embed_forward", [](const py::sequence& parameters, py::object x, py::object rows, Patches image,
                                  py::object position, py::object table, py::object out, const Execution& exec) {
    const auto list = matrices(parameters);
    image.image = pointer<void>(x), image.rows = matrix(rows), image.layout = layout(table);
    const PatchEmbedForward p{
        .parameters = list, .image = image, .position = matrix(position), .layout = layout(table), .out = matrix(out)};
    const py::gil_scoped_release release;
    patch_embed_forward(p, exec);
  });
  m.def("patch_embed_backward",
        [](const py::sequence& parameters, py::object rows, Patches image, py::object table, py::object grad_out,
           py::object grad_x, const py::sequence& grad_parameters, py::object workspace, const Execution& exec) {
          const auto list = matrices(parameters), grads = matrices(grad_parameters);
          PatchEmbedBackward p;
          p.parameters = list, p.layout = layout(table);
          p.image = image, p.image.image = pointer<void>(grad_x), p.image.rows = matrix(rows);
          p.image.layout = p.layout;
          p.grad_out = matrix(grad_out), p.grad_parameters = grads, p.workspace = pointer<void>(workspace);
          const py::gil_scoped_release release;
          patch_embed_backward(p, exec);
        });
}

ModelForward model_fields(const Config& config, const std::vector<Matrix>& parameters, py::handle x, py::handle t,
                          py::handle features, py::handle labels, py::handle table, py::handle sparse_table,
                          int64_t rows, int64_t sparse_rows) {
  ModelForward p;
  p.config = config, p.parameters = parameters;
  p.dtype = dtype_of(x);
  p.batch = x.attr("shape").cast<std::vector<int64_t>>().at(0);
  p.x = pointer<void>(x), p.t = pointer<const double>(t), p.labels = pointer<const int64_t>(labels);
  p.timestep_features = matrix(features);
  p.layout = layout(table), p.sparse_layout = layout(sparse_table);
  p.rows = rows, p.sparse_rows = sparse_rows;
  return p;
}

void bind_whole_model(py::module_& m) {
  py::enum_<ModelFamily>(m, "ModelFamily", py::module_local())
      .value("dit", ModelFamily::dit)
      .value("pixart", ModelFamily::pixart)
      .value("latte", ModelFamily::latte);
  py::class_<Config>(m, "Config", py::module_local())
      .def(py::init<>())
      .def("__eq__", &Config::operator==)
      .def_readwrite("input_height", &Config::input_height)
      .def_readwrite("input_width", &Config::input_width)
      .def_readwrite("patch_size", &Config::patch_size)
      .def_readwrite("in_channels", &Config::in_channels)
      .def_readwrite("out_channels", &Config::out_channels)
      .def_readwrite("hidden", &Config::hidden)
      .def_readwrite("mlp_hidden", &Config::mlp_hidden)
      .def_readwrite("num_heads", &Config::num_heads)
      .def_readwrite("label_rows", &Config::label_rows)
      .def_readwrite("num_pooling_blocks", &Config::num_pooling_blocks)
      .def_readwrite("num_sdtm", &Config::num_sdtm)
      .def_readwrite("generation_blocks", &Config::generation_blocks)
      .def_readwrite("sparse_blocks", &Config::sparse_blocks)
      .def_readwrite("recovery_blocks", &Config::recovery_blocks)
      .def_readwrite("dense_blocks", &Config::dense_blocks)
      .def_readwrite("num_dense_blocks", &Config::num_dense_blocks)
      .def_readwrite("reinject_position", &Config::reinject_position)
      .def_readwrite("timestep_shift", &Config::timestep_shift)
      .def_readwrite("mlp_norm_eps", &Config::mlp_norm_eps)
      .def_readwrite("family", &Config::family)
      .def_readwrite("num_frames", &Config::num_frames)
      .def_readwrite("caption_channels", &Config::caption_channels)
      .def_readwrite("max_caption_tokens", &Config::max_caption_tokens)
      .def_readwrite("size_conditions", &Config::size_conditions)
      .def_readwrite("position_scale", &Config::position_scale);
  m.def("model_parameters", [](const Config& config) {
    std::vector<std::tuple<std::string, int64_t, int64_t>> specs;
    for (const auto& spec : model_parameters(config)) specs.emplace_back(spec.name, spec.rows, spec.cols);
    return specs;
  });
  m.def("model_macs", &model_macs);
  m.def("model_bytes", [](const Config& config, const py::sequence& parameters, py::object x, py::object table,
                          py::object sparse, int64_t rows, int64_t sparse_rows) {
    const auto list = matrices(parameters);
    const auto p =
        model_fields(config, list, x, py::none(), py::none(), py::none(), table, sparse, rows, sparse_rows);
    return py::make_tuple(model_context_bytes(p), model_workspace_bytes(p, false), model_workspace_bytes(p, true),
                          model_backward_workspace_bytes(p));
  });
  m.def("model_forward",
        [](const Config& config, const py::sequence& parameters, py::object x, py::object t, py::object features,
           py::object labels, py::object table, py::object sparse, int64_t rows, int64_t sparse_rows, py::object out,
           py::object context, py::object workspace, const Execution& exec) {
          const auto list = matrices(parameters);
          ModelForward p = model_fields(config, list, x, t, features, labels, table, sparse, rows, sparse_rows);
          p.out = pointer<void>(out), p.context = pointer<void>(context), p.workspace = pointer<void>(workspace);
          const py::gil_scoped_release release;
          model_forward(p, exec);
        });
  m.def("model_backward",
        [](const Config& config, const py::sequence& parameters, py::object x, py::object t, py::object features,
           py::object labels, py::object table, py::object sparse, int64_t rows, int64_t sparse_rows,
           py::object context, py::object grad_out, py::object grad_x, const py::sequence& grad_parameters,
           py::object workspace, const Execution& exec) {
          const auto list = matrices(parameters), grads = matrices(grad_parameters);
          ModelBackward p;
          static_cast<ModelForward&>(p) =
              model_fields(config, list, x, t, features, labels, table, sparse, rows, sparse_rows);
          p.context = pointer<void>(context), p.workspace = pointer<void>(workspace);
          p.grad_out = pointer<void>(grad_out), p.grad_x = pointer<void>(grad_x), p.grad_parameters = grads;
          const py::gil_scoped_release release;
          model_backward(p, exec);
        });
}

}  // namespace

void bind_model(py::module_& m) {
  bind_blocks(m);
  bind_single_blocks(m);
  bind_ends(m);
  bind_whole_model(m);
}

}  // namespace flexdit::python
