/* A C program outside this repository that uses the installed library: it samples one image and prints its mean. */
#include <flexdit/c_api.h>
#include <stdio.h>
#include <stdlib.h>

static void succeed(flexdit_status status) {
  if (status == FLEXDIT_OK) return;
  fprintf(stderr, "%s\n", flexdit_last_error());
  exit(1);
}

static float* sample(const char* folder, int64_t label, int64_t* count) {
  flexdit_checkpoint* checkpoint;
  flexdit_model* model;
  flexdit_session* session;
  flexdit_request request;
  flexdit_image* image;
  float* values;
  int64_t id, left, shape[3];
  succeed(flexdit_checkpoint_load(folder, FLEXDIT_FLOAT32, &checkpoint));
  succeed(flexdit_model_prepare(checkpoint, NULL, &model));
  succeed(flexdit_session_create(model, NULL, &session));
  succeed(flexdit_request_init(&request, sizeof request));
  request.label = label, request.sampler = FLEXDIT_FLOW, request.steps = 4, request.guidance = 1.5;
  succeed(flexdit_session_add(session, &request, &id));
  do succeed(flexdit_session_step(session, &left));
  while (left > 0);
  succeed(flexdit_session_take(session, id, &image));
  succeed(flexdit_image_shape(image, shape));
  *count = shape[0] * shape[1] * shape[2];
  values = malloc((size_t)*count * sizeof *values);
  if (values) succeed(flexdit_image_copy(image, FLEXDIT_FLOAT32, values, *count));
  flexdit_image_free(image);
  flexdit_session_free(session);
  flexdit_model_free(model);
  flexdit_checkpoint_free(checkpoint);
  return values;
}

int main(int argc, char** argv) {
  int64_t i, count = 0;
  double sum = 0;
  float* values;
  if (argc != 2) return 2;
  values = sample(argv[1], 1, &count);
  if (!values) return 1;
  for (i = 0; i < count; ++i) sum += values[i];
  printf("flexdit %s: mean %.4f\n", flexdit_version(), sum / (double)count);
  free(values);
  return count == 64 && sum == sum ? 0 : 1;
}
