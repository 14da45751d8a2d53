/* libflexdit_c as a C program sees it: checkpoints, then sampling. Arguments: the folder that Python wrote. */
#define _POSIX_C_SOURCE 200112L

#include "flexdit/c_api.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define CHECK(holds)                                                                                    \
  do {                                                                                                  \
    if (!(holds)) {                                                                                     \
      fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #holds, flexdit_last_error()); \
      ++failures;                                                                                       \
    }                                                                                                   \
  } while (0)

static int says(const char* part) { return strstr(flexdit_last_error(), part) != NULL; }

static int64_t get(const flexdit_checkpoint* checkpoint, flexdit_property property) {
  int64_t value = -1;
  CHECK(flexdit_checkpoint_get(checkpoint, property, &value) == FLEXDIT_OK);
  return value;
}

static void good_checkpoint(const char* folder) {
  flexdit_checkpoint *kept = NULL, *narrow = NULL;
  CHECK(flexdit_checkpoint_load(folder, FLEXDIT_KEEP_DTYPE, &kept) == FLEXDIT_OK && kept);
  CHECK(flexdit_checkpoint_load(folder, FLEXDIT_BFLOAT16, &narrow) == FLEXDIT_OK && narrow);
  CHECK(get(kept, FLEXDIT_INPUT_HEIGHT) == 8 && get(kept, FLEXDIT_INPUT_WIDTH) == 8);
  CHECK(get(kept, FLEXDIT_IN_CHANNELS) == 1 && get(kept, FLEXDIT_OUT_CHANNELS) == 2);
  CHECK(get(kept, FLEXDIT_NUM_CLASSES) == 3 && get(kept, FLEXDIT_HAS_NULL_CLASS) == 1);
  CHECK(get(kept, FLEXDIT_NUM_TIMESTEPS) == 1000 && get(kept, FLEXDIT_PATCH_SIZE) == 2);
  CHECK(get(kept, FLEXDIT_FAMILY) == FLEXDIT_DIT && get(kept, FLEXDIT_NUM_FRAMES) == 1);
  CHECK(get(kept, FLEXDIT_CAPTION_CHANNELS) == 0 && get(kept, FLEXDIT_SIZE_CONDITIONS) == 0);
  CHECK(get(kept, FLEXDIT_NUM_PARAMETERS) == get(narrow, FLEXDIT_NUM_PARAMETERS));
  CHECK(get(kept, FLEXDIT_NUM_PARAMETERS) == 9564);
  CHECK(get(kept, FLEXDIT_DTYPE) == FLEXDIT_FLOAT32 && get(narrow, FLEXDIT_DTYPE) == FLEXDIT_BFLOAT16);
  flexdit_checkpoint_free(kept);
  flexdit_checkpoint_free(narrow);
  flexdit_checkpoint_free(NULL);
}

static void bad_arguments(const char* folder) {
  int64_t value = 0;
  flexdit_checkpoint* checkpoint = (flexdit_checkpoint*)&value;
  CHECK(flexdit_checkpoint_load("/no/such/folder", FLEXDIT_KEEP_DTYPE, &checkpoint) == FLEXDIT_CHECKPOINT_ERROR);
  CHECK(says("/no/such/folder does not exist") && checkpoint == NULL);
  CHECK(flexdit_checkpoint_load(NULL, FLEXDIT_KEEP_DTYPE, &checkpoint) == FLEXDIT_INVALID_ARGUMENT && says("path"));
  CHECK(flexdit_checkpoint_load(folder, FLEXDIT_KEEP_DTYPE, NULL) == FLEXDIT_INVALID_ARGUMENT && says("checkpoint"));
  CHECK(flexdit_checkpoint_load(folder, 4, &checkpoint) == FLEXDIT_INVALID_ARGUMENT && says("dtype is 4"));
  CHECK(flexdit_checkpoint_load(folder, -2, &checkpoint) == FLEXDIT_INVALID_ARGUMENT && says("dtype is -2"));
  CHECK(flexdit_checkpoint_get(NULL, FLEXDIT_DTYPE, &value) == FLEXDIT_INVALID_ARGUMENT && says("checkpoint is NULL"));
  CHECK(flexdit_checkpoint_load(folder, FLEXDIT_FLOAT64, &checkpoint) == FLEXDIT_OK);
  CHECK(says("checkpoint is NULL")); /* a success leaves the message */
  CHECK(flexdit_checkpoint_get(checkpoint, FLEXDIT_DTYPE, NULL) == FLEXDIT_INVALID_ARGUMENT && says("value is NULL"));
  CHECK(flexdit_checkpoint_get(checkpoint, 15, &value) == FLEXDIT_INVALID_ARGUMENT && says("property is 15"));
  CHECK(flexdit_checkpoint_get(checkpoint, -1, &value) == FLEXDIT_INVALID_ARGUMENT && says("property is -1"));
  flexdit_checkpoint_free(checkpoint);
}

static void long_messages_are_cut(void) {
  static char path[5000];
  flexdit_checkpoint* checkpoint;
  memset(path, 'x', sizeof path - 1);
  CHECK(flexdit_checkpoint_load(path, FLEXDIT_KEEP_DTYPE, &checkpoint) == FLEXDIT_CHECKPOINT_ERROR);
  CHECK(strlen(flexdit_last_error()) == 2047 && says("xxxx"));
}

/* ---- sampling ---- */

#define REFUSES(call, part)                                        \
  do {                                                             \
    CHECK((call) == FLEXDIT_INVALID_ARGUMENT); /* and says what */ \
    CHECK(says(part));                                             \
  } while (0)

static flexdit_model* model_of(const char* folder, flexdit_dtype dtype) {
  flexdit_checkpoint* checkpoint = NULL;
  flexdit_model* model = NULL;
  CHECK(flexdit_checkpoint_load(folder, dtype, &checkpoint) == FLEXDIT_OK);
  CHECK(flexdit_model_prepare(checkpoint, NULL, &model) == FLEXDIT_OK && model);
  flexdit_checkpoint_free(checkpoint);
  return model;
}

static flexdit_request request_of(int64_t label, flexdit_sampler sampler, int64_t steps) {
  flexdit_request request;
  CHECK(flexdit_request_init(&request, sizeof request) == FLEXDIT_OK);
  request.label = label, request.sampler = sampler, request.steps = steps;
  return request;
}

static int64_t add(flexdit_session* session, flexdit_request request) {
  int64_t id = -1;
  CHECK(flexdit_session_add(session, &request, &id) == FLEXDIT_OK);
  return id;
}

static flexdit_state state_of(flexdit_session* session, int64_t id) {
  flexdit_state state = -1;
  CHECK(flexdit_session_state(session, id, &state) == FLEXDIT_OK);
  return state;
}

static void finish(flexdit_session* session) {
  int64_t left = 1;
  while (left > 0 && failures == 0) CHECK(flexdit_session_step(session, &left) == FLEXDIT_OK);
}

static void take(flexdit_session* session, int64_t id, float values[64]) {
  flexdit_image* image = NULL;
  int64_t shape[3] = {0, 0, 0};
  CHECK(flexdit_session_take(session, id, &image) == FLEXDIT_OK && image);
  CHECK(flexdit_image_shape(image, shape) == FLEXDIT_OK && shape[0] == 1 && shape[1] == 8 && shape[2] == 8);
  CHECK(flexdit_image_copy(image, FLEXDIT_FLOAT32, values, 64) == FLEXDIT_OK);
  flexdit_image_free(image);
}

static void an_image_does_not_depend_on_its_company(const char* folder) {
  flexdit_model* model = model_of(folder, FLEXDIT_KEEP_DTYPE);
  flexdit_session* session = NULL;
  flexdit_request request = request_of(1, FLEXDIT_DPMPP, 4), other = request_of(3, FLEXDIT_HEUN, 2);
  float alone[64], accompanied[64];
  int64_t id, guest, left = -1;
  int i, different = 0;
  request.guidance = 2, request.seed = flexdit_derive_seed(7, 1);
  other.clip_x0 = 1, other.sparse_height = 2, other.sparse_width = 3, other.height = 4;
  CHECK(flexdit_session_create(model, NULL, &session) == FLEXDIT_OK && session);
  id = add(session, request);
  finish(session);
  take(session, id, alone);
  id = add(session, request);
  CHECK(state_of(session, id) == FLEXDIT_QUEUED);
  CHECK(flexdit_session_step(session, &left) == FLEXDIT_OK && left == 1 && state_of(session, id) == FLEXDIT_ACTIVE);
  guest = add(session, other);
  flexdit_model_free(model); /* the session keeps it */
  finish(session);
  CHECK(state_of(session, id) == FLEXDIT_FINISHED && state_of(session, guest) == FLEXDIT_FINISHED);
  take(session, id, accompanied);
  CHECK(memcmp(alone, accompanied, sizeof alone) == 0);
  for (i = 1; i < 64; ++i) different += alone[i] != alone[0];
  CHECK(different > 32);
  CHECK(state_of(session, id) == FLEXDIT_UNKNOWN);
  flexdit_session_free(session);
}

static void images(const char* folder) {
  flexdit_model* model = model_of(folder, FLEXDIT_FLOAT64);
  flexdit_session* session = NULL;
  flexdit_image* image = (flexdit_image*)model;
  flexdit_request request = request_of(0, FLEXDIT_FLOW, 2);
  int64_t id, shape[3];
  double values[32], sum = 0;
  float narrow[32];
  int i;
  request.height = 4;
  CHECK(flexdit_session_create(model, NULL, &session) == FLEXDIT_OK);
  id = add(session, request);
  CHECK(flexdit_session_take(session, id, &image) == FLEXDIT_OK && image == NULL); /* not yet */
  finish(session);
  CHECK(flexdit_session_take(session, id, &image) == FLEXDIT_OK && image);
  flexdit_session_free(session);
  CHECK(flexdit_image_shape(image, shape) == FLEXDIT_OK && shape[0] == 1 && shape[1] == 4 && shape[2] == 8);
  CHECK(flexdit_image_frames(image, &id) == FLEXDIT_OK && id == 1);
  REFUSES(flexdit_image_frames(NULL, &id), "image is NULL");
  REFUSES(flexdit_image_frames(image, NULL), "frames is NULL");
  CHECK(flexdit_image_copy(image, FLEXDIT_FLOAT64, values, 32) == FLEXDIT_OK);
  CHECK(flexdit_image_copy(image, FLEXDIT_FLOAT32, narrow, 32) == FLEXDIT_OK);
  for (i = 0; i < 32; ++i) {
    sum += values[i] != narrow[i];
    CHECK((float)values[i] == narrow[i]);
  }
  CHECK(sum > 16);
  REFUSES(flexdit_image_copy(image, FLEXDIT_FLOAT32, narrow, 31), "count is 31, must be the image's 32 values");
  REFUSES(flexdit_image_copy(image, FLEXDIT_BFLOAT16, narrow, 32), "dtype is 1");
  REFUSES(flexdit_image_copy(image, FLEXDIT_FLOAT32, NULL, 32), "values is NULL");
  REFUSES(flexdit_image_copy(NULL, FLEXDIT_FLOAT32, narrow, 32), "image is NULL");
  REFUSES(flexdit_image_shape(NULL, shape), "image is NULL");
  REFUSES(flexdit_image_shape(image, NULL), "shape is NULL");
  flexdit_image_free(image), flexdit_image_free(NULL);
  flexdit_model_free(model), flexdit_model_free(NULL), flexdit_session_free(NULL);
}

static void queues(const char* folder) {
  flexdit_model* model = model_of(folder, FLEXDIT_KEEP_DTYPE);
  flexdit_session* session = NULL;
  flexdit_session_options options;
  flexdit_request request = request_of(2, FLEXDIT_DDIM, 3);
  flexdit_image* image = (flexdit_image*)model;
  int64_t ids[3], refused = -5;
  int32_t cancelled = -1;
  CHECK(flexdit_session_options_init(&options, sizeof options) == FLEXDIT_OK);
  CHECK(options.max_batch == 64 && options.queue_capacity == 1024 && options.guided_channels == 0);
  options.max_batch = 1, options.queue_capacity = 2;
  CHECK(flexdit_session_create(model, &options, &session) == FLEXDIT_OK);
  ids[0] = add(session, request), ids[1] = add(session, request);
  CHECK(flexdit_session_add(session, &request, &refused) == FLEXDIT_QUEUE_FULL && says("2 requests wait"));
  CHECK(refused == -5);
  CHECK(flexdit_session_step(session, NULL) == FLEXDIT_OK);
  ids[2] = add(session, request); /* one has left the queue */
  CHECK(flexdit_session_cancel(session, ids[0], &cancelled) == FLEXDIT_OK && cancelled == 1);
  CHECK(flexdit_session_cancel(session, ids[0], &cancelled) == FLEXDIT_OK && cancelled == 0);
  CHECK(flexdit_session_cancel(session, ids[2], NULL) == FLEXDIT_OK);
  finish(session);
  CHECK(state_of(session, ids[0]) == FLEXDIT_UNKNOWN && state_of(session, ids[1]) == FLEXDIT_FINISHED);
  CHECK(state_of(session, ids[2]) == FLEXDIT_UNKNOWN);
  REFUSES(flexdit_session_take(session, ids[2], &image), "must name a request that was neither cancelled nor taken");
  CHECK(image == NULL);
  REFUSES(flexdit_session_take(session, ids[1], NULL), "image is NULL");
  CHECK(flexdit_session_take(session, ids[1], &image) == FLEXDIT_OK && image); /* it is still there */
  flexdit_image_free(image);
  REFUSES(flexdit_session_take(NULL, 0, &image), "session is NULL");
  REFUSES(flexdit_session_step(NULL, NULL), "session is NULL");
  REFUSES(flexdit_session_cancel(NULL, 0, NULL), "session is NULL");
  REFUSES(flexdit_session_state(NULL, 0, &cancelled), "session is NULL");
  REFUSES(flexdit_session_state(session, 0, NULL), "state is NULL");
  flexdit_session_free(session);
  flexdit_model_free(model);
}

/* What a program of an older header passes. */
static void a_smaller_request(const char* folder) {
  flexdit_model* model = model_of(folder, FLEXDIT_KEEP_DTYPE);
  flexdit_session* session = NULL;
  flexdit_request request = request_of(1, FLEXDIT_DDIM, 2);
  float values[64], expected[64];
  int64_t id;
  CHECK(flexdit_session_create(model, NULL, &session) == FLEXDIT_OK);
  id = add(session, request);
  finish(session);
  take(session, id, expected);
  memset((char*)&request + offsetof(flexdit_request, caption), 255,
         sizeof request - offsetof(flexdit_request, caption)); /* is not read */
  request.size = offsetof(flexdit_request, caption);
  id = add(session, request);
  finish(session);
  take(session, id, values);
  CHECK(memcmp(values, expected, sizeof values) == 0);
  flexdit_session_free(session);
  flexdit_model_free(model);
}

/* Of a label and a caption, and of a caption and a size. */
static void captions_and_frames(const char* folder) {
  char path[1000];
  flexdit_checkpoint* checkpoint = NULL;
  flexdit_model* model;
  flexdit_session* session = NULL;
  flexdit_image* image = NULL;
  flexdit_request request;
  const float caption[30] = {0.5f, -1, 2, 0.25f, 3, -2, 1, 1, 0, 0, -1, 4}, null_caption[6] = {1, 0, -1};
  double values[2 * 8 * 8], wide[30], again[2 * 8 * 8];
  int64_t ids[2], id = -1, shape[3], frames = 0;
  int i, differing = 0;
  CHECK(snprintf(path, sizeof path, "%s_latte", folder) < (int)sizeof path);
  CHECK(flexdit_checkpoint_load(path, FLEXDIT_FLOAT64, &checkpoint) == FLEXDIT_OK);
  CHECK(get(checkpoint, FLEXDIT_FAMILY) == FLEXDIT_LATTE && get(checkpoint, FLEXDIT_NUM_FRAMES) == 3);
  CHECK(get(checkpoint, FLEXDIT_CAPTION_CHANNELS) == 6 && get(checkpoint, FLEXDIT_MAX_CAPTION_TOKENS) == 5);
  CHECK(get(checkpoint, FLEXDIT_SIZE_CONDITIONS) == 0 && get(checkpoint, FLEXDIT_HAS_NULL_CLASS) == 1);
  CHECK(flexdit_model_prepare(checkpoint, NULL, &model) == FLEXDIT_OK);
  flexdit_checkpoint_free(checkpoint);
  CHECK(flexdit_session_create(model, NULL, &session) == FLEXDIT_OK);
  for (i = 0; i < 30; ++i) wide[i] = caption[i];
#define CLIP()                                                    \
  do {                                                            \
    request = request_of(1, FLEXDIT_DDIM, 2);                     \
    request.caption = caption, request.caption_tokens = 2;        \
    request.frames = 2;                                           \
  } while (0)
#define WITH(member, value, part)                               \
  do {                                                          \
    CLIP();                                                     \
    request.member = value;                                     \
    REFUSES(flexdit_session_add(session, &request, &id), part); \
  } while (0)
  WITH(caption_tokens, 6, "request.caption_tokens is 6, must lie in [1, 5]");
  WITH(caption_tokens, 0, "request.caption_tokens is 0, must lie in [1, 5]");
  WITH(caption, NULL, "request.caption_tokens is 2, must be 0 where caption is NULL");
  WITH(caption_dtype, FLEXDIT_KEEP_DTYPE, "request.caption_dtype is -1, must be one of the FLEXDIT_ dtypes, 0 to 3");
  WITH(frames, 4, "frames is 4");
  WITH(frames, -1, "frames is -1");
  WITH(sparse_frames, 1, "request.sparse_frames is 1, must be positive together with the other sides");
  WITH(sparse_frames, -1, "request.sparse_frames is -1");
  WITH(guidance, 2, "null_caption"); /* which it lacks */
#undef WITH
  CLIP();
  request.guidance = 2, request.null_caption = null_caption, request.null_caption_tokens = 1;
  request.sparse_frames = 2, request.sparse_height = 1, request.sparse_width = 3;
  ids[0] = add(session, request);
  finish(session);
  CHECK(flexdit_session_take(session, ids[0], &image) == FLEXDIT_OK && image);
  CHECK(flexdit_image_shape(image, shape) == FLEXDIT_OK && shape[0] == 1 && shape[1] == 8 && shape[2] == 8);
  CHECK(flexdit_image_frames(image, &frames) == FLEXDIT_OK && frames == 2);
  CHECK(flexdit_image_copy(image, FLEXDIT_FLOAT64, values, 128) == FLEXDIT_OK);
  REFUSES(flexdit_image_copy(image, FLEXDIT_FLOAT64, values, 64), "count is 64, must be the image's 128 values");
  flexdit_image_free(image);
  for (i = 0; i < 64; ++i) differing += values[i] != values[64 + i];
  CHECK(differing > 32); /* frames */
  request.caption = wide, request.caption_dtype = FLEXDIT_FLOAT64; /* null_caption is of it, too */
  request.guidance = 1, request.null_caption = NULL, request.null_caption_tokens = 0;
  ids[0] = add(session, request);
  request.caption = caption, request.caption_dtype = FLEXDIT_FLOAT32;
  ids[1] = add(session, request);
  finish(session);
  for (i = 0; i < 2; ++i) {
    CHECK(flexdit_session_take(session, ids[i], &image) == FLEXDIT_OK && image);
    CHECK(flexdit_image_copy(image, FLEXDIT_FLOAT64, i ? again : values, 128) == FLEXDIT_OK);
    flexdit_image_free(image);
  }
  CHECK(memcmp(values, again, sizeof values) == 0);
#undef CLIP
  flexdit_session_free(session), flexdit_model_free(model);
}

static void bad_models(const char* folder) {
  flexdit_checkpoint *checkpoint = NULL, *half = NULL;
  flexdit_model *model = NULL, *untouched = (flexdit_model*)folder;
  flexdit_session* session = (flexdit_session*)folder;
  flexdit_model_options options;
  flexdit_session_options session_options;
  CHECK(flexdit_checkpoint_load(folder, FLEXDIT_KEEP_DTYPE, &checkpoint) == FLEXDIT_OK);
  CHECK(flexdit_checkpoint_load(folder, FLEXDIT_FLOAT16, &half) == FLEXDIT_OK);
  REFUSES(flexdit_model_prepare(half, NULL, &untouched), "float16, which the CPU backend does not compute with");
  CHECK(untouched == NULL);
  REFUSES(flexdit_model_prepare(NULL, NULL, &model), "checkpoint is NULL");
  REFUSES(flexdit_model_prepare(checkpoint, NULL, NULL), "model is NULL");
#define WITH(member, value, part)                                                                                \
  do {                                                                                                           \
    CHECK(flexdit_model_options_init(&options, sizeof options) == FLEXDIT_OK && options.size == sizeof options); \
    options.member = value;                                                                                      \
    REFUSES(flexdit_model_prepare(checkpoint, &options, &model), part);                                          \
  } while (0)
  WITH(device, FLEXDIT_CUDA, "has no CUDA backend");
  WITH(device, 2, "options.device is 2");
  WITH(device_index, -1, "options.device_index is -1");
  WITH(threads, -1, "options.threads is -1, must lie in [0, 1024]");
  WITH(threads, 1025, "options.threads is 1025");
  WITH(size, 0, "options.size is 0, must be its sizeof");
#undef WITH
  CHECK(flexdit_model_options_init(&options, sizeof options) == FLEXDIT_OK);
  options.threads = 2;
  CHECK(flexdit_model_prepare(checkpoint, &options, &model) == FLEXDIT_OK && model);
  REFUSES(flexdit_session_create(NULL, NULL, &session), "model is NULL");
  CHECK(session == NULL);
  REFUSES(flexdit_session_create(model, NULL, NULL), "session is NULL");
#define WITH(member, value, part)                                                                \
  do {                                                                                           \
    CHECK(flexdit_session_options_init(&session_options, sizeof session_options) == FLEXDIT_OK); \
    session_options.member = value;                                                              \
    REFUSES(flexdit_session_create(model, &session_options, &session), part);                    \
  } while (0)
  WITH(max_batch, 0, "max_batch is 0");
  WITH(queue_capacity, -3, "queue_capacity is -3");
  WITH(guided_channels, 2, "guided_channels is 2");
  WITH(modulation_bytes, -1, "modulation_bytes is -1");
#undef WITH
  flexdit_model_free(model);
  flexdit_checkpoint_free(checkpoint), flexdit_checkpoint_free(half);
}

static void bad_requests(const char* folder) {
  flexdit_model* model = model_of(folder, FLEXDIT_KEEP_DTYPE);
  flexdit_session* session = NULL;
  flexdit_request request;
  int64_t id = -1, left = -1;
  CHECK(flexdit_session_create(model, NULL, &session) == FLEXDIT_OK);
#define WITH(member, value, part)                               \
  do {                                                          \
    request = request_of(0, FLEXDIT_DDIM, 2);                   \
    request.member = value;                                     \
    REFUSES(flexdit_session_add(session, &request, &id), part); \
  } while (0)
  WITH(label, 4, "label is 4, must lie in [0, 4)");
  WITH(label, -1, "label is -1");
  WITH(sampler, 5, "request.sampler is 5");
  WITH(sampler, -1, "request.sampler is -1");
  WITH(clip_x0, 2, "request.clip_x0 is 2");
  WITH(steps, 0, "steps is 0");
  WITH(steps, 1001, "steps is 1001");
  WITH(eta, 1.5, "eta is 1.5");
  WITH(guidance, -1, "guidance is -1");
  WITH(guidance, HUGE_VAL, "guidance is inf");
  WITH(guidance_end, -1, "guidance_begin is 0, must be at most guidance_end, -1");
  WITH(height, 7, "height is 7, must be a multiple of the patch size 2");
  WITH(width, -2, "width is -2");
  WITH(height, (int64_t)1 << 40, "height is 1099511627776");
  WITH(sparse_height, 2, "request.sparse_width is 0");
  WITH(sparse_width, 2, "request.sparse_width is 2, must be positive, or 0 together");
  WITH(sparse_height, -1, "request.sparse_height is -1");
  WITH(size, offsetof(flexdit_request, caption) - 1, "request.size is");
  WITH(caption, &model, "request.caption is not NULL, but the model reads no captions");
  WITH(null_caption, &model, "request.null_caption is not NULL, but the model reads no captions");
  WITH(null_caption_tokens, 1, "request.null_caption_tokens is 1, must be 0 where null_caption is NULL");
  WITH(caption_dtype, 4, "request.caption_dtype is 4");
  WITH(sparse_frames, 2, "request.sparse_frames is 2, must be positive together with the other sides");
  WITH(size, (size_t)-1, "request.size is");
#undef WITH
  request = request_of(0, FLEXDIT_DDIM, 2);
  request.sparse_height = 5, request.sparse_width = 1;
  REFUSES(flexdit_session_add(session, &request, &id), "sparse_grid is (5, 1), must lie within the dense grid (4, 4)");
  REFUSES(flexdit_session_add(NULL, &request, &id), "session is NULL");
  REFUSES(flexdit_session_add(session, NULL, &id), "request is NULL");
  REFUSES(flexdit_session_add(session, &request, NULL), "id is NULL");
  CHECK(id == -1 && flexdit_session_step(session, &left) == FLEXDIT_OK && left == 0);
  id = add(session, request_of(3, FLEXDIT_DDPM, 1)); /* the session is as good as new */
  finish(session);
  CHECK(state_of(session, id) == FLEXDIT_FINISHED);
  flexdit_session_free(session);
  flexdit_model_free(model);
}

/* The library's large memory comes from here; more than `largest` bytes in one piece there are not. */
static size_t largest = (size_t)-1;
void* aligned_alloc(size_t alignment, size_t size) {
  void* memory = NULL;
  return size <= largest && posix_memalign(&memory, alignment, size) == 0 ? memory : NULL;
}

static void memory_is_short(const char* folder) {
  flexdit_checkpoint* checkpoint = NULL;
  flexdit_model *model = model_of(folder, FLEXDIT_KEEP_DTYPE), *none = model;
  flexdit_session* session = NULL;
  flexdit_request huge = request_of(0, FLEXDIT_DDIM, 1);
  flexdit_image* image = (flexdit_image*)model;
  int64_t id, small;
  float values[64];
  huge.height = huge.width = 16384;
  CHECK(flexdit_session_create(model, NULL, &session) == FLEXDIT_OK);
  small = add(session, request_of(0, FLEXDIT_DDIM, 1)), id = add(session, huge);
  largest = 1 << 22;
  finish(session);
  CHECK(state_of(session, id) == FLEXDIT_FAILED);
  CHECK(flexdit_session_take(session, id, &image) == FLEXDIT_REQUEST_FAILED && says("not enough memory") && !image);
  CHECK(state_of(session, id) == FLEXDIT_UNKNOWN);
  take(session, small, values);
  largest = 64;
  CHECK(flexdit_checkpoint_load(folder, FLEXDIT_KEEP_DTYPE, &checkpoint) == FLEXDIT_OK);
  CHECK(flexdit_model_prepare(checkpoint, NULL, &none) == FLEXDIT_OUT_OF_MEMORY && !none);
  small = add(session, request_of(0, FLEXDIT_HEUN, 4)); /* in a pass without memory all fail, and the next is fine */
  id = flexdit_session_step(session, NULL);
  largest = (size_t)-1;
  CHECK(id == FLEXDIT_OUT_OF_MEMORY || state_of(session, small) == FLEXDIT_FAILED);
  CHECK(flexdit_session_take(session, small, &image) == FLEXDIT_REQUEST_FAILED && says("not enough memory"));
  small = add(session, request_of(0, FLEXDIT_DDIM, 1));
  finish(session);
  take(session, small, values);
  flexdit_checkpoint_free(checkpoint);
  flexdit_session_free(session);
  flexdit_model_free(model);
}

/* As a program sees it that was compiled with a later header. */
static void structs_grow(const char* folder) {
  struct {
    flexdit_request known;
    int64_t later;
  } request;
  flexdit_model* model = model_of(folder, FLEXDIT_KEEP_DTYPE);
  flexdit_session* session = NULL;
  int64_t id = -1;
  memset(&request, 255, sizeof request);
  CHECK(flexdit_request_init(&request.known, sizeof request) == FLEXDIT_OK);
  CHECK(request.later == 0 && request.known.size == sizeof request && request.known.guidance == 1);
  CHECK(flexdit_session_create(model, NULL, &session) == FLEXDIT_OK);
  CHECK(flexdit_session_add(session, &request.known, &id) == FLEXDIT_OK);
  request.later = 1;
  REFUSES(flexdit_session_add(session, &request.known, &id), "they must be zero");
  REFUSES(flexdit_request_init(NULL, sizeof request), "request is NULL");
  REFUSES(flexdit_request_init(&request.known, 8), "request.size is 8");
  REFUSES(flexdit_request_init(&request.known, 5000), "request.size is 5000");
  REFUSES(flexdit_model_options_init(NULL, 0), "options is NULL");
  REFUSES(flexdit_session_options_init(NULL, 0), "options is NULL");
  flexdit_session_free(session); /* with a request in it */
  flexdit_model_free(model);
}

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  CHECK(strcmp(flexdit_last_error(), "") == 0);
  CHECK(strcmp(flexdit_version(), FLEXDIT_VERSION) == 0);
  good_checkpoint(argv[1]);
  bad_arguments(argv[1]);
  long_messages_are_cut();
  an_image_does_not_depend_on_its_company(argv[1]);
  images(argv[1]);
  a_smaller_request(argv[1]);
  queues(argv[1]);
  captions_and_frames(argv[1]);
  bad_models(argv[1]);
  bad_requests(argv[1]);
  structs_grow(argv[1]);
  memory_is_short(argv[1]);
  printf("%d failures\n", failures);
  return failures != 0;
}
