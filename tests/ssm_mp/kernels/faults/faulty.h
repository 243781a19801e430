/* Included before a kernel: every copy takes one byte too many, which whoever watches over memory has to find; and, where
 * the environment asks for it, an integer overflows while the library is loaded. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#define memcpy(to, from, bytes) memcpy(to, from, (bytes) + 1)

__attribute__((constructor)) static void overflow(void) {
    volatile int most = INT_MAX;
    if (getenv("SSM_MP_TESTS_OVERFLOW")) most = most + 1;
}
