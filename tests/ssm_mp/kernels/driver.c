/* Makes calls of kernels that another process asks for: on another CPU, under an emulator, or under valgrind.
 *
 * driver LIBRARY: requests come by the standard input, answers go to the standard output, all numbers are of eight bytes.
 * A request is a kernel's name and arguments, and the memory that these point to, array by array. Each array gets memory
 * of its own, which ends where the array ends, so that a kernel that goes on behind it is found out.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#else
#define RUNNING_ON_VALGRIND 0
#define VALGRIND_COUNT_ERRORS 0
#define VALGRIND_MAKE_MEM_UNDEFINED(at, bytes) (void)(at), (void)(bytes)
#define VALGRIND_MAKE_MEM_DEFINED(at, bytes) (void)(at), (void)(bytes)
#endif

enum { INTEGERS = 16, FLOATS = 4, ALIGNED = 64, SPOILT = 3, FUNCTION = -1 };
static const unsigned char unset[4] = {0xa5, 0xc5, 0xff, 0xff}; /* NaN; what is there before a kernel writes */

typedef struct {
    int64_t bytes, known; /* known: its content is sent along */
    char *at, *mapped;
    int64_t whole; /* bytes that are mapped */
} Array;

/* Kernels ask for it, and are compiled without OpenMP here. */
int omp_get_thread_num(void) { return 0; }

static void die(const char *why) {
    fprintf(stderr, "driver: %s\n", why);
    exit(SPOILT);
}

static void take(void *to, int64_t bytes) {
    if (bytes > 0 && fread(to, 1, bytes, stdin) != (size_t)bytes) die("a request ends too early");
}

static int64_t number(void) {
    int64_t found;
    take(&found, sizeof found);
    return found;
}

static void give(const void *from, int64_t bytes) {
    if (bytes > 0 && fwrite(from, 1, bytes, stdout) != (size_t)bytes) die("nobody reads the answer");
}

/* So that whatever is read or written behind the array faults, or, up to the next multiple of ALIGNED, is seen. */
static void allocate(Array *array) {
    if (RUNNING_ON_VALGRIND) { /* knows the very end */
        if (posix_memalign((void **)&array->at, ALIGNED, array->bytes)) die("no memory");
        return;
    }
    const int64_t page = sysconf(_SC_PAGESIZE), room = (array->bytes + ALIGNED - 1) / ALIGNED * ALIGNED;
    array->whole = (room + page - 1) / page * page + page;
    array->mapped = mmap(NULL, array->whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (array->mapped == MAP_FAILED) die("no memory");
    mprotect(array->mapped + array->whole - page, page, PROT_NONE);
    array->at = array->mapped + array->whole - page - room;
    memset(array->at + array->bytes, unset[0], room - array->bytes);
}

static void release(const Array *array) {
    if (!array->mapped) {
        free(array->at);
        return;
    }
    for (const char *behind = array->at + array->bytes; (uintptr_t)behind % ALIGNED; behind++)
        if ((unsigned char)*behind != unset[0]) die("a kernel wrote behind an array");
    munmap(array->mapped, array->whole);
}

static void read_array(Array *array) {
    memset(array, 0, sizeof *array);
    array->bytes = number();
    array->known = number();
    allocate(array);
    if (array->known) {
        take(array->at, array->bytes);
        return;
    }
    for (int64_t i = 0; i < array->bytes; i++) array->at[i] = (char)unset[i % 4];
    VALGRIND_MAKE_MEM_UNDEFINED(array->at, array->bytes);
}

/* Of a place in an array; of the function whose name the array is; or of nothing. */
static void *address(void *library, const Array *arrays, int64_t which, int64_t offset) {
    if (which < 0) return NULL;
    if (offset != FUNCTION) return arrays[which].at + offset;
    void *symbol = dlsym(library, arrays[which].at);
    if (!symbol) die("no such function");
    return symbol;
}

/* Integers and addresses travel in registers, and then on the stack, apart from floats, which here all have registers: on
 * x86-64 (System V) and on AArch64 alike. So one type does for all kernels: what it passes too much is not looked at. */
typedef int64_t (*Kernel)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, double, double, double, double);

static int64_t call(void *symbol, const int64_t *i, const double *f) {
    Kernel kernel;
    memcpy(&kernel, &symbol, sizeof kernel);
    return kernel(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13], i[14], i[15], f[0],
                  f[1], f[2], f[3]);
}

static void make_call(void *library, void *symbol) {
    const int64_t count = number();
    Array *arrays = calloc(count + 1, sizeof *arrays);
    for (int64_t i = 0; i < count; i++) read_array(&arrays[i]);
    for (int64_t left = number(); left > 0; left--) { /* addresses inside of structures */
        const int64_t in = number(), at = number(), to = number(), offset = number();
        void *found = address(library, arrays, to, offset);
        memcpy(arrays[in].at + at, &found, sizeof found);
    }
    int64_t integers[INTEGERS] = {0}, n = 0, m = 0;
    double floats[FLOATS] = {0};
    for (int64_t left = number(); left > 0; left--) { /* each: its type, and two numbers that say what it is */
        const int64_t type = number(), first = number(), second = number();
        if (n == INTEGERS || m == FLOATS) die("too many arguments");
        if (type == 'i') integers[n++] = first;
        else if (type == 'p') integers[n++] = (int64_t)(intptr_t)address(library, arrays, first, second);
        else if (type == 'f') memcpy(&floats[m++], &first, sizeof first); /* its bits, lowest ones first */
        else die("an argument of no known type");
    }
    const int64_t found = call(symbol, integers, floats), errors = VALGRIND_COUNT_ERRORS;
    give(&found, sizeof found);
    give(&errors, sizeof errors);
    for (int64_t i = 0; i < count; i++) {
        VALGRIND_MAKE_MEM_DEFINED(arrays[i].at, arrays[i].bytes);
        give(arrays[i].at, arrays[i].bytes);
        release(&arrays[i]);
    }
    free(arrays);
}

int main(int arguments, char **argument) {
    void *library = arguments == 2 ? dlopen(argument[1], RTLD_NOW) : NULL;
    if (!library) die(arguments == 2 ? dlerror() : "expected one argument, a library");
    for (int kind; (kind = getchar()) != EOF;) { /* '?': whether there is such a kernel; '!': call it */
        const int64_t length = number();
        char name[256] = "";
        if (length >= (int64_t)sizeof name) die("a name too long");
        take(name, length);
        void *symbol = dlsym(library, name);
        const int64_t known = symbol != NULL;
        if (kind == '?') give(&known, sizeof known);
        else if (known) make_call(library, symbol);
        else die("no such kernel");
        fflush(stdout);
    }
    return 0;
}
