/* Included before a kernel: an integer overflows while the library is loaded. */
#include <limits.h>
__attribute__((constructor)) static void overflow(void) {
    volatile int most = INT_MAX;
    most = most + 1;
}
