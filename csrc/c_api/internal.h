// What the functions of the C interface share: what stands behind the handles, and how exceptions end: none leaves a
// function, each becomes a status and a message.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "flexdit/c_api.h"
#include "flexdit/checkpoint.h"
#include "flexdit/session.h"

struct flexdit_checkpoint {
  flexdit::Checkpoint value;
};
struct flexdit_model {
  std::shared_ptr<const flexdit::SamplingModel> value;
};
struct flexdit_session {
  std::shared_ptr<const flexdit::SamplingModel> model;
  flexdit::Session value;
};
struct flexdit_image {
  flexdit::Finished value;
};

namespace flexdit::c_api {

// A request that was taken has failed.
struct RequestFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Keeps the message for this thread; returns the status.
flexdit_status fail(flexdit_status status, const char* message);

template <class Body>
flexdit_status guarded(Body&& body) noexcept {
  try {
    body();
    return FLEXDIT_OK;
  } catch (const ArgumentError& error) {
    return fail(FLEXDIT_INVALID_ARGUMENT, error.what());
  } catch (const CheckpointError& error) {
    return fail(FLEXDIT_CHECKPOINT_ERROR, error.what());
  } catch (const DeviceError& error) {
    return fail(FLEXDIT_DEVICE_ERROR, error.what());
  } catch (const QueueFull& error) {
    return fail(FLEXDIT_QUEUE_FULL, error.what());
  } catch (const RequestFailed& error) {
    return fail(FLEXDIT_REQUEST_FAILED, error.what());
  } catch (const std::bad_alloc&) {
    return fail(FLEXDIT_OUT_OF_MEMORY, "not enough memory");
  } catch (const std::exception& error) {
    return fail(FLEXDIT_INTERNAL_ERROR, error.what());
  } catch (...) {
    return fail(FLEXDIT_INTERNAL_ERROR, "an exception of unknown type");
  }
}

inline void require(bool holds, const std::string& message) {
  if (!holds) throw ArgumentError(message);
}
inline void require_pointer(const void* pointer, const char* name) {
  require(pointer != nullptr, std::string(name) + " is NULL, must point to something");
}

}  // namespace flexdit::c_api
