// What this library is.
#include "bt_cpu.h"

BT_API const char *bt_key(void) { return BT_KEY; }

BT_API const char *bt_target(void) { return BT_TARGET; }

BT_API const char *bt_error(int status) {
  switch (status) {
    case BT_OK: return "no error";
    case BT_BAD_ARGUMENT: return "an argument is outside of what this function takes";
    default: return "an unknown status";
  }
}
