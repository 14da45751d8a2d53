/* libflexdit_c as a C program sees it. Arguments: the folder that Python wrote. */
#include "flexdit/c_api.h"

#include <stdio.h>
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
  CHECK(get(kept, FLEXDIT_NUM_TIMESTEPS) == 1000);
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
  CHECK(flexdit_checkpoint_get(checkpoint, 9, &value) == FLEXDIT_INVALID_ARGUMENT && says("property is 9"));
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

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  CHECK(strcmp(flexdit_last_error(), "") == 0);
  CHECK(strcmp(flexdit_version(), FLEXDIT_VERSION) == 0);
  good_checkpoint(argv[1]);
  bad_arguments(argv[1]);
  long_messages_are_cut();
  printf("%d failures\n", failures);
  return failures != 0;
}
