/* The C interface of libflexdit_c, for programs in other languages. C90, but for <stdint.h>.
 *
 * A function that can fail returns a status; flexdit_last_error() then has the reason in words. Handles are opaque,
 * belong to the caller and are given back with their _free function, which takes NULL, too. A handle may be used from
 * several threads at once as long as nobody frees it.
 *
 * Options are plain structs that may grow at their end. `size` is the caller's sizeof; the _init function writes it and
 * every default. A library that is older than the caller's header refuses members it does not know unless they are
 * zero, a newer one gives those that the caller lacks their default.
 */
#ifndef FLEXDIT_C_API_H
#define FLEXDIT_C_API_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FLEXDIT_API __attribute__((visibility("default")))
#else
#define FLEXDIT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t flexdit_status;
enum {
  FLEXDIT_OK = 0,
  FLEXDIT_INVALID_ARGUMENT = 1, /* the message names the argument, what it was and what is allowed */
  FLEXDIT_CHECKPOINT_ERROR = 2, /* a file is missing, unreadable, broken, or does not fit the model */
  FLEXDIT_OUT_OF_MEMORY = 3,
  FLEXDIT_DEVICE_ERROR = 4,
  FLEXDIT_INTERNAL_ERROR = 5,
  FLEXDIT_QUEUE_FULL = 6,    /* step the session, take what has finished, and come again */
  FLEXDIT_REQUEST_FAILED = 7 /* the request that was taken failed, and the message says why */
};

typedef int32_t flexdit_dtype;
enum {
  FLEXDIT_KEEP_DTYPE = -1, /* the dtype of the file */
  FLEXDIT_FLOAT32 = 0,
  FLEXDIT_BFLOAT16 = 1,
  FLEXDIT_FLOAT16 = 2, /* the CPU stores it, but does not compute with it */
  FLEXDIT_FLOAT64 = 3
};

/* "0.1.0". Never NULL. */
FLEXDIT_API const char* flexdit_version(void);

/* Why the calling thread's last failing call failed. Never NULL; valid until that thread's next failing call. */
FLEXDIT_API const char* flexdit_last_error(void);

/* ---- checkpoints --------------------------------------------------------------------------------------------------
 */

typedef struct flexdit_checkpoint flexdit_checkpoint;

/* Loads the folder that save_pretrained of FlexDiT, FlexPixArt or FlexLatte wrote, or a .safetensors file with its
 * configuration in the metadata, and converts the parameters to `dtype`. The files may be replaced or deleted
 * afterwards, but not written in place. On failure *checkpoint is NULL. */
FLEXDIT_API flexdit_status flexdit_checkpoint_load(const char* path, flexdit_dtype dtype,
                                                   flexdit_checkpoint** checkpoint);
FLEXDIT_API void flexdit_checkpoint_free(flexdit_checkpoint* checkpoint);

typedef int32_t flexdit_property;
enum {
  FLEXDIT_INPUT_HEIGHT = 0, /* of the (latent) image */
  FLEXDIT_INPUT_WIDTH = 1,
  FLEXDIT_IN_CHANNELS = 2,
  FLEXDIT_OUT_CHANNELS = 3,   /* twice in_channels with learned variance */
  FLEXDIT_NUM_CLASSES = 4,    /* labels are 0 to num_classes - 1; 0: the model has none */
  FLEXDIT_HAS_NULL_CLASS = 5, /* 1 if label num_classes stands for none, as classifier-free guidance needs it */
  FLEXDIT_NUM_TIMESTEPS = 6,  /* of the diffusion */
  FLEXDIT_DTYPE = 7,          /* a flexdit_dtype */
  FLEXDIT_NUM_PARAMETERS = 8, /* values, the fixed position embedding included */
  FLEXDIT_PATCH_SIZE = 9,
  FLEXDIT_FAMILY = 10,             /* a flexdit_family */
  FLEXDIT_NUM_FRAMES = 11,         /* of a clip at most; 1 of images */
  FLEXDIT_CAPTION_CHANNELS = 12,   /* of the text encoder's output; 0: the model reads no captions */
  FLEXDIT_MAX_CAPTION_TOKENS = 13, /* of a caption */
  FLEXDIT_SIZE_CONDITIONS = 14     /* 1 if requests have a resolution and an aspect ratio */
};
typedef int32_t flexdit_family;
enum {
  FLEXDIT_DIT = 0,    /* FlexDiT: images of a label */
  FLEXDIT_PIXART = 1, /* FlexPixArt: images of a caption */
  FLEXDIT_LATTE = 2   /* FlexLatte: clips of a label, a caption or neither */
};
FLEXDIT_API flexdit_status flexdit_checkpoint_get(const flexdit_checkpoint* checkpoint, flexdit_property property,
                                                  int64_t* value);

/* ---- sampling -----------------------------------------------------------------------------------------------------
 */

typedef int32_t flexdit_device;
enum { FLEXDIT_CPU = 0, FLEXDIT_CUDA = 1 };

typedef struct flexdit_model_options {
  size_t size;
  flexdit_device device; /* FLEXDIT_CPU */
  int32_t device_index;  /* of the CUDA device: 0 */
  int64_t threads;       /* on the CPU, at most 1024; 0: as many as OpenMP takes */
  void* stream;          /* cudaStream_t: NULL */
} flexdit_model_options;
FLEXDIT_API flexdit_status flexdit_model_options_init(flexdit_model_options* options, size_t size);

/* A checkpoint's weights as sampling wants them, a copy in the checkpoint's dtype, which the device must compute with:
 * float32 or bfloat16, on the CPU also float64, on CUDA also float16. options: NULL for the defaults. The checkpoint
 * may be freed afterwards; sessions keep the model. On failure *model is NULL. */
typedef struct flexdit_model flexdit_model;
FLEXDIT_API flexdit_status flexdit_model_prepare(const flexdit_checkpoint* checkpoint,
                                                 const flexdit_model_options* options, flexdit_model** model);
FLEXDIT_API void flexdit_model_free(flexdit_model* model);

typedef struct flexdit_session_options {
  size_t size;
  int64_t max_batch;        /* requests that advance together: 64 */
  int64_t queue_capacity;   /* requests that may wait: 1024 */
  int64_t guided_channels;  /* 0: the first three, or as many as there are, as DiT does; of other families all */
  int64_t modulation_bytes; /* memory for the modulations of steps to come: 2^28 */
} flexdit_session_options;
FLEXDIT_API flexdit_status flexdit_session_options_init(flexdit_session_options* options, size_t size);

/* Requests that advance together; an image does not depend on its company. options: NULL for the defaults. On failure
 * *session is NULL. */
typedef struct flexdit_session flexdit_session;
FLEXDIT_API flexdit_status flexdit_session_create(const flexdit_model* model, const flexdit_session_options* options,
                                                  flexdit_session** session);
FLEXDIT_API void flexdit_session_free(flexdit_session* session);

typedef int32_t flexdit_sampler;
enum {
  FLEXDIT_DDIM = 0,
  FLEXDIT_DDPM = 1,
  FLEXDIT_DPMPP = 2, /* DPM-Solver++(2M) */
  FLEXDIT_FLOW = 3,  /* Euler's method for a flow matching model */
  FLEXDIT_HEUN = 4   /* Heun's, two passes of the model in every step but the last */
};

typedef struct flexdit_request {
  size_t size;
  int64_t label;           /* 0 to num_classes - 1, or num_classes for the null class; without classes 0: 0 */
  uint64_t seed;           /* of all noise: 0. Image i of a run in Python has flexdit_derive_seed(seed, i) */
  flexdit_sampler sampler; /* FLEXDIT_DDIM */
  int32_t clip_x0;         /* 1 clamps the predicted image to [-1, 1] in every step: 0 */
  int64_t steps;           /* 1 to 1000: 50 */
  double eta;              /* of DDIM, 0 to 1: 0 */
  double guidance;         /* at least 0, 1 is none; another one needs a null class or a null caption: 1 */
  double guidance_begin;   /* timesteps at which it guides, both included: 0 */
  double guidance_end;     /* 1e9 */
  int64_t height, width;   /* of the latent image, multiples of the patch size, or 0 for the model's: 0 */
  int64_t sparse_height;   /* of the sparse grid, or both 0 for the density schedule's: 0 */
  int64_t sparse_width;
  /* Of FlexPixArt and FlexLatte. Captions are a text encoder's output [tokens, FLEXDIT_CAPTION_CHANNELS] without
   * padding, at any alignment, and are copied. The passes without condition read null_caption: guidance needs it. */
  const void* caption; /* NULL where the model reads none: NULL */
  int64_t caption_tokens;
  const void* null_caption;
  int64_t null_caption_tokens;
  flexdit_dtype caption_dtype; /* of both: FLEXDIT_FLOAT32 */
  int32_t sparse_frames;       /* of the sparse grid, with the other sides; 0 is 1: 0 */
  int64_t frames;              /* of the clip, or 0 for the model's: 0 */
  double resolution[2];        /* height and width in pixels, and */
  double aspect_ratio;         /* height / width, with FLEXDIT_SIZE_CONDITIONS: 0 */
} flexdit_request;
FLEXDIT_API flexdit_status flexdit_request_init(flexdit_request* request, size_t size);
FLEXDIT_API uint64_t flexdit_derive_seed(uint64_t seed, uint64_t index);

/* Queues a request; *id names it in this session. FLEXDIT_QUEUE_FULL when queue_capacity others wait. */
FLEXDIT_API flexdit_status flexdit_session_add(flexdit_session* session, const flexdit_request* request, int64_t* id);

/* Lets queued requests in and advances every active one by one pass of the model. left: NULL, or how many are active or
 * queued after it. A request for which there is no memory fails alone. When the device fails in the pass itself, so
 * does this function; those in the pass have failed, and the session goes on with the others. */
FLEXDIT_API flexdit_status flexdit_session_step(flexdit_session* session, int64_t* left);

typedef int32_t flexdit_state;
enum {
  FLEXDIT_QUEUED = 0,
  FLEXDIT_ACTIVE = 1,
  FLEXDIT_FINISHED = 2,
  FLEXDIT_FAILED = 3,
  FLEXDIT_UNKNOWN = 4 /* never there, cancelled, or taken */
};
FLEXDIT_API flexdit_status flexdit_session_state(const flexdit_session* session, int64_t id, flexdit_state* state);

/* *cancelled: NULL, or whether the request was queued or active; it leaves before the next step. */
FLEXDIT_API flexdit_status flexdit_session_cancel(flexdit_session* session, int64_t id, int32_t* cancelled);

/* Takes the image of a finished request, which is then forgotten. *image is NULL while the request is queued or active,
 * and on failure: FLEXDIT_REQUEST_FAILED if the request failed, which is then forgotten, FLEXDIT_INVALID_ARGUMENT if it
 * is unknown. */
typedef struct flexdit_image flexdit_image;
FLEXDIT_API flexdit_status flexdit_session_take(flexdit_session* session, int64_t id, flexdit_image** image);
FLEXDIT_API void flexdit_image_free(flexdit_image* image);

/* Channels, height, width; of a clip those of each frame. */
FLEXDIT_API flexdit_status flexdit_image_shape(const flexdit_image* image, int64_t shape[3]);
/* 1 of an image. */
FLEXDIT_API flexdit_status flexdit_image_frames(const flexdit_image* image, int64_t* frames);
/* Copies the values [channels, frames, height, width] as FLEXDIT_FLOAT32 or FLEXDIT_FLOAT64; count: the product of
 * these. They are float32 values, of a float64 model float64 ones. */
FLEXDIT_API flexdit_status flexdit_image_copy(const flexdit_image* image, flexdit_dtype dtype, void* values,
                                              int64_t count);

#ifdef __cplusplus
}
#endif

#endif /* FLEXDIT_C_API_H */
