// One step of sampling for whoever is in the batch: model inputs, the model, and the samplers' updates. Its plan, that
// is layouts, buffers and on a GPU the captured graph, is kept for every composition of the batch.
#pragma once

#include <list>
#include <map>

#include "model/captions.h"
#include "model/positions.h"

namespace flexdit {

// What an occupant does in a step.
struct StepOrder {
  Grid sparse;
  StepNumbers numbers;              // the model's samples are filled in by the engine
  const void* modulation;           // a row of model_modulation's, on the device
  const void* null_modulation;      // the same for the unconditional pass, or null: not guided
};

class Engine {
 public:
  Engine(std::shared_ptr<const SamplingModel> model, int64_t guided_channels);
  ~Engine();

  // Who is in the batch, in this order: those that are new start from noise, those not listed are gone. When memory for
  // them is not to be had it throws, and everybody is as before.
  void arrange(std::vector<Occupant> occupants);
  // One order for every occupant. Throws when memory that a failed arrange() gave back is not to be had again.
  void step(std::span<const StepOrder> orders);
  // Waits for the steps so far and gives an occupant's image [channels, H, W].
  std::vector<double> read(int64_t id);
  std::span<const Occupant> occupants() const { return occupants_; }

 private:
  struct Key {
    std::vector<Grid> dense, sparse;
    std::vector<bool> guided;
    bool operator==(const Key&) const = default;
  };
  struct Plan;
  struct Block;

  Plan& plan_for(Key key);
  void make_tables(Plan& plan);
  void reserve_model(const std::vector<Occupant>& occupants);
  void place(const std::vector<Occupant>& occupants);
  ModelForward forward_of(const Plan& plan) const;
  std::vector<LayoutRow> caption_layout(std::span<const StepOrder> orders) const;
  void run(const Plan& plan, const Execution& exec);
  void forget_graphs();
  int64_t values_of(const Grid& dense) const { return dense.tokens() * prepared_.config.in_channels * patch_area_; }

  std::shared_ptr<const SamplingModel> model_;
  const SamplingModel::Prepared& prepared_;
  const Execution exec_;
  const DType state_;  // of x and x0
  const int64_t guided_channels_, patch_area_;
  std::vector<Occupant> occupants_;
  Buffer x_, x0_, spare_;  // packed states; spare_ while they move
  Buffer input_, output_, modulation_, workspace_, block_;
  bool reserved_ = false;  // all of these are there
  PositionTables positions_;
  CaptionStore captions_;
  Uploader uploader_;
  std::list<Plan> plans_;  // the last used first
};

}  // namespace flexdit
