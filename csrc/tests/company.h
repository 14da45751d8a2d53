// That an image does not depend on its company: requests of every kind join and leave a session at random steps.
#pragma once

#include <map>

#include "session_case.h"

namespace flexdit::test {

struct CompanyCase {
  int64_t requests = 6, most_steps = 4, most_batch = 4;
};

// Runs `requests` random requests alone and in company and returns the largest difference over the largest magnitude:
// 0 if they are equal to the bit. Every third one is cancelled on its way and only disturbs.
inline double difference_in_company(const TestModel& test_model, const std::shared_ptr<const SamplingModel>& model,
                                    uint64_t seed, const CompanyCase& c) {
  Random random(seed);
  const int64_t batches[] = {1, 2, 3, 4, 5};
  SessionOptions options{.max_batch = std::min(batches[1 + random.below(4)], c.most_batch)};
  if (random.below(2)) options.modulation_bytes = 1;  // one step at a time
  Session session(model, options);
  std::map<int64_t, Values> wanted;
  std::vector<int64_t> doomed;
  int64_t left = c.requests;
  while (left > 0 || session.active() + session.queued() > 0) {
    while (left > 0 && random.below(3)) {
      const SampleRequest r = random_request(random, test_model, c.most_steps);
      const int64_t id = session.add(r);
      if (left-- % 3 == 0)
        doomed.push_back(id);
      else
        wanted[id] = alone(model, r);
    }
    session.step();
    if (!doomed.empty() && random.below(2)) {
      session.cancel(doomed.back());
      doomed.pop_back();
    }
  }
  double worst = 0;
  size_t seen = 0;
  for (const Finished& f : session.take_all()) {
    const auto found = wanted.find(f.id);
    if (found == wanted.end()) continue;  // finished before it was to be cancelled
    ++seen;
    const Values got = image_of(f);
    CHECK_NOTE(f.error.empty(), "seed ", seed, ": ", f.error);
    if (!identical(got, found->second)) worst = std::max(worst, relative_difference(got, found->second));
  }
  CHECK_NOTE(seen == wanted.size(), "seed ", seed, ": ", seen, " images of ", wanted.size());
  return worst;
}

}  // namespace flexdit::test
