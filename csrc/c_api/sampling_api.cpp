// Sampling through the C interface.
#include <algorithm>
#include <cstddef>
#include <cstring>

#include "c_api/internal.h"
#include "io/cast.h"

using namespace flexdit;
using namespace flexdit::c_api;

namespace {

static_assert(static_cast<int>(Device::cpu) == FLEXDIT_CPU && static_cast<int>(Device::cuda) == FLEXDIT_CUDA);
static_assert(static_cast<int>(SamplerKind::ddim) == FLEXDIT_DDIM &&
              static_cast<int>(SamplerKind::ddpm) == FLEXDIT_DDPM &&
              static_cast<int>(SamplerKind::dpmpp) == FLEXDIT_DPMPP &&
              static_cast<int>(SamplerKind::flow_euler) == FLEXDIT_FLOW &&
              static_cast<int>(SamplerKind::flow_heun) == FLEXDIT_HEUN);
static_assert(static_cast<int>(RequestState::queued) == FLEXDIT_QUEUED &&
              static_cast<int>(RequestState::active) == FLEXDIT_ACTIVE &&
              static_cast<int>(RequestState::finished) == FLEXDIT_FINISHED &&
              static_cast<int>(RequestState::failed) == FLEXDIT_FAILED &&
              static_cast<int>(RequestState::unknown) == FLEXDIT_UNKNOWN);

constexpr size_t kLargestStruct = 4096;  // of a header to come; a larger size was never written
constexpr int64_t kMaxThreads = 1024;

// Sizes of the structs when they came: less is none of them. Members are only ever added behind.
template <class Struct>
constexpr size_t kFirstSize = sizeof(Struct);
template <>
constexpr size_t kFirstSize<flexdit_request> = offsetof(flexdit_request, caption);

constexpr flexdit_model_options kModelDefaults = {
    .size = sizeof(flexdit_model_options), .device = FLEXDIT_CPU, .device_index = 0, .threads = 0, .stream = nullptr};
constexpr flexdit_request kRequestDefaults = {.size = sizeof(flexdit_request),
                                              .label = 0,
                                              .seed = 0,
                                              .sampler = FLEXDIT_DDIM,
                                              .clip_x0 = 0,
                                              .steps = 50,
                                              .eta = 0,
                                              .guidance = 1,
                                              .guidance_begin = 0,
                                              .guidance_end = 1e9,
                                              .height = 0,
                                              .width = 0,
                                              .sparse_height = 0,
                                              .sparse_width = 0,
                                              .caption = nullptr,
                                              .caption_tokens = 0,
                                              .null_caption = nullptr,
                                              .null_caption_tokens = 0,
                                              .caption_dtype = FLEXDIT_FLOAT32,
                                              .sparse_frames = 0,
                                              .frames = 0,
                                              .resolution = {0, 0},
                                              .aspect_ratio = 0};
flexdit_session_options session_defaults() {
  const SessionOptions o;
  return {sizeof(flexdit_session_options), o.max_batch, o.queue_capacity, o.guided_channels, o.modulation_bytes};
}

template <class Struct>
void require_size(size_t size, const char* name) {
  require(size >= kFirstSize<Struct> && size <= kLargestStruct,
          std::string(name) + ".size is " + std::to_string(size) + ", must be its sizeof, at least " +
              std::to_string(kFirstSize<Struct>) + "; the _init function writes it");
}

// The defaults in a caller's struct that may be larger or smaller than this library's.
template <class Struct>
flexdit_status initialize(Struct* to, size_t size, const Struct& defaults, const char* name) {
  return guarded([&] {
    require_pointer(to, name);
    require_size<Struct>(size, name);
    std::memset(to, 0, size);
    std::memcpy(to, &defaults, std::min(size, sizeof(Struct)));
    std::memcpy(to, &size, sizeof size);  // the first member
  });
}

// The caller's struct as this library has it.
template <class Struct>
Struct options_from(const Struct* given, const Struct& defaults, const char* name) {
  Struct out = defaults;
  if (!given) return out;
  require_size<Struct>(given->size, name);
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  const size_t known = std::min(given->size, sizeof(Struct));
  require(std::all_of(bytes + known, bytes + given->size, [](unsigned char byte) { return byte == 0; }),
          std::string(name) + " sets members behind its byte " + std::to_string(known) + " that flexdit " +
              flexdit_version() + " does not have: they must be zero");
  std::memcpy(&out, given, known);
  return out;
}

Execution execution_from(const flexdit_model_options& o) {
  require(o.device == FLEXDIT_CPU || o.device == FLEXDIT_CUDA,
          "options.device is " + std::to_string(o.device) + ", must be FLEXDIT_CPU, 0, or FLEXDIT_CUDA, 1");
  require(o.threads >= 0 && o.threads <= kMaxThreads,
          "options.threads is " + std::to_string(o.threads) + ", must lie in [0, " + std::to_string(kMaxThreads) + "]");
  require(o.device_index >= 0, "options.device_index is " + std::to_string(o.device_index) + ", must be at least 0");
  return {static_cast<Device>(o.device), static_cast<int>(o.threads), o.device_index, o.stream};
}

CaptionInput caption_from(const char* name, const void* values, int64_t tokens, flexdit_dtype dtype,
                          const Config& config) {
  const std::string what = std::string("request.") + name;
  require(!values || config.caption_channels > 0, what + " is not NULL, but the model reads no captions");
  require(values ? tokens >= 1 && tokens <= config.max_caption_tokens : tokens == 0,
          what + "_tokens is " + std::to_string(tokens) +
              (values ? ", must lie in [1, " + std::to_string(config.max_caption_tokens) + "]"
                      : ", must be 0 where " + std::string(name) + " is NULL"));
  require(dtype >= FLEXDIT_FLOAT32 && dtype <= FLEXDIT_FLOAT64,
          "request.caption_dtype is " + std::to_string(dtype) + ", must be one of the FLEXDIT_ dtypes, 0 to 3");
  const int64_t count = tokens * config.caption_channels;
  CaptionInput out{.rows = std::vector<double>(static_cast<size_t>(count)), .tokens = tokens};
  io::cast(values, static_cast<DType>(dtype), out.rows.data(), DType::float64, count);
  return out;
}

std::optional<Grid> sparse_grid_from(const flexdit_request& r) {
  for (const auto& [name, side] : {std::pair("height", r.sparse_height), std::pair("width", r.sparse_width)})
    require(side >= 0 && side <= INT32_MAX && (side > 0) == (r.sparse_height > 0),
            std::string("request.sparse_") + name + " is " + std::to_string(side) +
                ", must be positive, or 0 together with the other side");
  require(r.sparse_frames >= 0 && (r.sparse_frames == 0 || r.sparse_height > 0),
          "request.sparse_frames is " + std::to_string(r.sparse_frames) +
              ", must be positive together with the other sides, or 0");
  if (r.sparse_height == 0) return {};
  return Grid{std::max<int32_t>(1, r.sparse_frames), static_cast<int32_t>(r.sparse_height),
              static_cast<int32_t>(r.sparse_width)};
}

SampleRequest request_from(const flexdit_request& r, const Config& config) {
  require(r.sampler >= FLEXDIT_DDIM && r.sampler <= FLEXDIT_HEUN,
          "request.sampler is " + std::to_string(r.sampler) + ", must be one of flexdit_sampler, 0 to 4");
  require(r.clip_x0 == 0 || r.clip_x0 == 1, "request.clip_x0 is " + std::to_string(r.clip_x0) + ", must be 0 or 1");
  return {
      .label = r.label,
      .seed = r.seed,
      .steps = sampler_steps(static_cast<SamplerKind>(r.sampler), r.steps, r.eta, config.learned_variance()),
      .guidance = r.guidance,
      .guidance_begin = r.guidance_begin,
      .guidance_end = r.guidance_end,
      .height = r.height,
      .width = r.width,
      .sparse_grid = sparse_grid_from(r),
      .clip_x0 = r.clip_x0 == 1,
      .caption = caption_from("caption", r.caption, r.caption_tokens, r.caption_dtype, config),
      .null_caption = caption_from("null_caption", r.null_caption, r.null_caption_tokens, r.caption_dtype, config),
      .frames = r.frames,
      .resolution = {r.resolution[0], r.resolution[1]},
      .aspect_ratio = r.aspect_ratio};
}

template <class Value>
void copy_values(const std::vector<double>& from, void* to) {
  std::transform(from.begin(), from.end(), static_cast<Value*>(to), [](double v) { return static_cast<Value>(v); });
}

}  // namespace

flexdit_status flexdit_model_options_init(flexdit_model_options* options, size_t size) {
  return initialize(options, size, kModelDefaults, "options");
}
flexdit_status flexdit_session_options_init(flexdit_session_options* options, size_t size) {
  return initialize(options, size, session_defaults(), "options");
}
flexdit_status flexdit_request_init(flexdit_request* request, size_t size) {
  return initialize(request, size, kRequestDefaults, "request");
}

uint64_t flexdit_derive_seed(uint64_t seed, uint64_t index) { return derive_seed(seed, index); }

flexdit_status flexdit_model_prepare(const flexdit_checkpoint* checkpoint, const flexdit_model_options* options,
                                     flexdit_model** model) {
  return guarded([&] {
    require_pointer(model, "model");
    *model = nullptr;
    require_pointer(checkpoint, "checkpoint");
    const Execution exec = execution_from(options_from(options, kModelDefaults, "options"));
    *model = new flexdit_model{prepare_sampling(checkpoint->value, exec)};
  });
}
void flexdit_model_free(flexdit_model* model) { delete model; }

flexdit_status flexdit_session_create(const flexdit_model* model, const flexdit_session_options* options,
                                      flexdit_session** session) {
  return guarded([&] {
    require_pointer(session, "session");
    *session = nullptr;
    require_pointer(model, "model");
    const auto o = options_from(options, session_defaults(), "options");
    const SessionOptions given{o.max_batch, o.queue_capacity, o.guided_channels, o.modulation_bytes};
    *session = new flexdit_session{model->value, Session(model->value, given)};
  });
}
void flexdit_session_free(flexdit_session* session) { delete session; }

flexdit_status flexdit_session_add(flexdit_session* session, const flexdit_request* request, int64_t* id) {
  return guarded([&] {
    require_pointer(session, "session");
    require_pointer(request, "request");
    require_pointer(id, "id");
    const auto given = options_from(request, kRequestDefaults, "request");
    *id = session->value.add(request_from(given, session->model->config()));
  });
}

flexdit_status flexdit_session_step(flexdit_session* session, int64_t* left) {
  return guarded([&] {
    require_pointer(session, "session");
    const int64_t count = session->value.step();
    if (left) *left = count;
  });
}

flexdit_status flexdit_session_state(const flexdit_session* session, int64_t id, flexdit_state* state) {
  return guarded([&] {
    require_pointer(session, "session");
    require_pointer(state, "state");
    *state = static_cast<flexdit_state>(session->value.state(id));
  });
}

flexdit_status flexdit_session_cancel(flexdit_session* session, int64_t id, int32_t* cancelled) {
  return guarded([&] {
    require_pointer(session, "session");
    const bool left = session->value.cancel(id);
    if (cancelled) *cancelled = left;
  });
}

flexdit_status flexdit_session_take(flexdit_session* session, int64_t id, flexdit_image** image) {
  return guarded([&] {
    require_pointer(image, "image");
    *image = nullptr;
    require_pointer(session, "session");
    auto out = std::make_unique<flexdit_image>();  // before the request is forgotten
    if (auto finished = session->value.take(id)) {
      if (finished->image.empty()) throw RequestFailed(finished->error);
      out->value = std::move(*finished);
      *image = out.release();
    } else {
      require(session->value.state(id) != RequestState::unknown,
              "id is " + std::to_string(id) + ", must name a request that was neither cancelled nor taken");
    }
  });
}
void flexdit_image_free(flexdit_image* image) { delete image; }

flexdit_status flexdit_image_shape(const flexdit_image* image, int64_t shape[3]) {
  return guarded([&] {
    require_pointer(image, "image");
    require_pointer(shape, "shape");
    shape[0] = image->value.channels, shape[1] = image->value.height, shape[2] = image->value.width;
  });
}

flexdit_status flexdit_image_frames(const flexdit_image* image, int64_t* frames) {
  return guarded([&] {
    require_pointer(image, "image");
    require_pointer(frames, "frames");
    *frames = image->value.frames;
  });
}

flexdit_status flexdit_image_copy(const flexdit_image* image, flexdit_dtype dtype, void* values, int64_t count) {
  return guarded([&] {
    require_pointer(image, "image");
    require_pointer(values, "values");
    const auto& from = image->value.image;
    require(count == static_cast<int64_t>(from.size()),
            "count is " + std::to_string(count) + ", must be the image's " + std::to_string(from.size()) + " values");
    require(dtype == FLEXDIT_FLOAT32 || dtype == FLEXDIT_FLOAT64,
            "dtype is " + std::to_string(dtype) + ", must be FLEXDIT_FLOAT32, 0, or FLEXDIT_FLOAT64, 3");
    dtype == FLEXDIT_FLOAT32 ? copy_values<float>(from, values) : copy_values<double>(from, values);
  });
}
