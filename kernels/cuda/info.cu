// What the library says about itself.
#include "bt_device.cuh"

#ifndef BT_KEY
#define BT_KEY ""
#endif
#ifndef BT_TARGET
#define BT_TARGET ""
#endif

BT_API const char *bt_key(void) { return BT_KEY; }
BT_API const char *bt_target(void) { return BT_TARGET; }

BT_API const char *bt_error(int status) {
  if (status == BT_OK) return "no error";
  if (status == BT_BAD_ARGUMENT) return "an argument has a value that it cannot have";
  if (status < BT_CUDA_ERROR) return "an unknown status";
  return cudaGetErrorString(static_cast<cudaError_t>(status - BT_CUDA_ERROR));
}

#ifdef CUDA_ON_CPU
// Chooses the order in which the emulation gives threads their turns, 0 to 3.
BT_API void bt_emulation_order(int order) { cuda_on_cpu::order = order; }
#endif
