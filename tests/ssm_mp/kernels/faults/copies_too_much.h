/* Included before a kernel: every copy takes one byte too many, which whoever watches over memory has to find. */
#include <string.h>
#define memcpy(to, from, bytes) memcpy(to, from, (bytes) + 1)
