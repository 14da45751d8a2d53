/* The C interface of libflexdit_c, for programs in other languages. C99.
 *
 * A function that can fail returns a status; flexdit_last_error() then has the reason in words. Handles are opaque,
 * belong to the caller and are given back with their _free function, which takes NULL, too. A handle may be used from
 * several threads at once as long as nobody frees it.
 */
#ifndef FLEXDIT_C_API_H
#define FLEXDIT_C_API_H

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
  FLEXDIT_INTERNAL_ERROR = 5
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

/* Loads the folder that save_pretrained wrote, or a .safetensors file with its configuration in the metadata, and
 * converts the parameters to `dtype`. The files may be replaced or deleted afterwards, but not written in place.
 * On failure *checkpoint is NULL. */
FLEXDIT_API flexdit_status flexdit_checkpoint_load(const char* path, flexdit_dtype dtype,
                                                   flexdit_checkpoint** checkpoint);
FLEXDIT_API void flexdit_checkpoint_free(flexdit_checkpoint* checkpoint);

typedef int32_t flexdit_property;
enum {
  FLEXDIT_INPUT_HEIGHT = 0, /* of the (latent) image */
  FLEXDIT_INPUT_WIDTH = 1,
  FLEXDIT_IN_CHANNELS = 2,
  FLEXDIT_OUT_CHANNELS = 3,   /* twice in_channels with learned variance */
  FLEXDIT_NUM_CLASSES = 4,    /* labels are 0 to num_classes - 1 */
  FLEXDIT_HAS_NULL_CLASS = 5, /* 1 if label num_classes stands for none, as classifier-free guidance needs it */
  FLEXDIT_NUM_TIMESTEPS = 6,  /* of the diffusion */
  FLEXDIT_DTYPE = 7,          /* a flexdit_dtype */
  FLEXDIT_NUM_PARAMETERS = 8  /* values, the fixed position embedding included */
};
FLEXDIT_API flexdit_status flexdit_checkpoint_get(const flexdit_checkpoint* checkpoint, flexdit_property property,
                                                  int64_t* value);

#ifdef __cplusplus
}
#endif

#endif /* FLEXDIT_C_API_H */
