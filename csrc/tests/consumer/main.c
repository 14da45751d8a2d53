/* A C program outside this repository that uses the installed library. */
#include <flexdit/c_api.h>
#include <inttypes.h>
#include <stdio.h>

int main(int argc, char** argv) {
  flexdit_checkpoint* checkpoint;
  int64_t parameters = 0;
  if (argc != 2) return 2;
  if (flexdit_checkpoint_load(argv[1], FLEXDIT_KEEP_DTYPE, &checkpoint) != FLEXDIT_OK ||
      flexdit_checkpoint_get(checkpoint, FLEXDIT_NUM_PARAMETERS, &parameters) != FLEXDIT_OK) {
    fprintf(stderr, "%s\n", flexdit_last_error());
    return 1;
  }
  printf("flexdit %s, %" PRId64 " parameters\n", flexdit_version(), parameters);
  flexdit_checkpoint_free(checkpoint);
  return parameters > 0 ? 0 : 1;
}
