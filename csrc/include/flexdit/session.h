// Sampling with the whole loop inside the library: weights are prepared once, and requests of any age, sampler, guidance
// and image size advance together, each at its own timestep and on its own sparse grid.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "flexdit/model.h"
#include "flexdit/sampler.h"

namespace flexdit {

struct Checkpoint;

// A model's weights as sampling wants them, its own copy: modulation layers in one matrix, on the CPU packed for its
// products, on a GPU W_o W_v of pooling blocks folded. Shared by sessions; nothing changes it.
struct SamplingModelOptions {
  Config config;
  // None: default_schedule of each size. FlexPixArt and FlexLatte follow one that is given on other sizes as it is, as
  // their Python modules do, FlexDiT in proportion; FlexDiT with modules must have one.
  std::optional<DensitySchedule> schedule;
  std::span<const Matrix> parameters;  // model_parameters(config), on the host or on exec's device, all of dtype
  DType dtype = DType::float32;
  int64_t null_label = -1;  // the label of unconditional passes, or -1: no guidance
  Execution exec;
};
class SamplingModel {
 public:
  explicit SamplingModel(const SamplingModelOptions& options);  // throws ArgumentError, DeviceError, std::bad_alloc
  ~SamplingModel();
  SamplingModel(const SamplingModel&) = delete;

  const Config& config() const;
  const DensitySchedule& schedule() const;  // of the config's own size
  DType dtype() const;
  int64_t null_label() const;
  const Execution& execution() const;

  struct Prepared;
  const Prepared& prepared() const { return *prepared_; }

 private:
  std::unique_ptr<Prepared> prepared_;
};
// Of a checkpoint's weights, in its dtype.
std::shared_ptr<const SamplingModel> prepare_sampling(const Checkpoint& checkpoint, const Execution& exec = {});

// A text encoder's output [tokens, caption_channels], padding left out; no tokens: none given.
struct CaptionInput {
  std::vector<double> rows;
  int64_t tokens = 0;
};

struct SampleRequest {
  int64_t label = 0;
  uint64_t seed = 0;  // all noise of the image comes from it: draw 0 at the start, draw i + 1 in step i
  std::vector<SamplerStep> steps;                // sampler_steps()
  double guidance = 1;                           // uncond + guidance (cond - uncond), at least 0; 1 is none
  double guidance_begin = 0, guidance_end = 1e9;  // timesteps at which it guides, both included
  int64_t height = 0, width = 0;                 // of the latent image, multiples of the patch; 0: the config's
  std::optional<Grid> sparse_grid;               // instead of the schedule's
  bool clip_x0 = false;                          // clamp the predicted x0 to [-1, 1]
  // Of FlexPixArt and FlexLatte. Unconditional passes read null_caption where the model reads captions, which guidance
  // then needs, and have the null label where the model has one.
  CaptionInput caption, null_caption;
  int64_t frames = 0;                             // of a clip; 0: the config's
  double resolution[2] = {0, 0}, aspect_ratio = 0;  // with size_conditions: height and width in pixels, height / width
};

struct SessionOptions {
  int64_t max_batch = 64;         // requests that advance together; the others wait
  int64_t queue_capacity = 1024;  // requests that may wait
  int64_t guided_channels = 0;    // 0: DiT's min(3, in_channels); all of FlexPixArt's and FlexLatte's
  // Modulations are computed ahead, for as many steps as fit into this.
  int64_t modulation_bytes = int64_t{256} << 20;
};

// The queue is full; take finished requests, step, and come again.
struct QueueFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class RequestState : uint8_t { queued, active, finished, failed, unknown };

struct Finished {
  int64_t id;
  int64_t channels, frames, height, width;
  // [channels, frames, height, width]: float32 values, of a float64 model float64; empty: it failed
  std::vector<double> image;
  std::string error;          // why, or empty
};

// All may be called by any thread; of several that step, one waits for the other.
class Session {
 public:
  explicit Session(std::shared_ptr<const SamplingModel> model, const SessionOptions& options = {});
  ~Session();

  int64_t add(SampleRequest request);  // its id; throws ArgumentError, QueueFull
  bool cancel(int64_t id);             // whether it was queued or active; it leaves before the next step
  // Advances every active request by one pass of the model, after letting queued ones in. Returns how many are active
  // or queued after it. A request that cannot be let in (no memory for one more) fails alone; when the device fails in
  // the pass itself, the error is thrown, those in the pass have failed, and the session goes on with the others.
  int64_t step();
  RequestState state(int64_t id) const;
  std::optional<Finished> take(int64_t id);  // once finished or failed; it is forgotten
  std::vector<Finished> take_all();
  int64_t active() const;
  int64_t queued() const;

 private:
  class Implementation;
  std::unique_ptr<Implementation> implementation_;
};

}  // namespace flexdit
