/* How many inputs are multiplied with a weight: in panels of 64 outputs, by floats, by integers, or by AMX's tiles.
 *
 * Of a panel lie the words of some outputs side by side, four bytes of each: a float32 number, two or four integers, or two
 * bfloat16 ones; a strip of them after another. Inputs lie row after row.
 */
#ifndef SSM_MP_PLAN_H
#define SSM_MP_PLAN_H

#include "lay_values.h"
#include "quantize.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define HAS_VNNI 1
#endif
#if defined(HAS_VNNI) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { VECTORS = PANEL / WIDTH }; /* registers of a panel's outputs */

/* A tile: up to six inputs, or those of AMX, by as many registers of outputs as leave some for weights and inputs. */
enum { TALL = 6, AMX_TALL = 32, AMX_WORDS = 16 };
#if defined(__AVX512F__) || defined(__aarch64__)
enum { WIDE = 4 };
#else
enum { WIDE = 2 };
#endif

/* Words of an output after which a panel's other outputs are multiplied first, so that weights stay near the core. So
 * many products of two integers up to 127 are a number that float32 holds exactly. */
enum { NEAR_WORDS = 256 };

typedef enum { BY_FLOATS, BY_INTEGERS, BY_AMX } Way;

typedef struct {
    const Matrix *of;
    Way way;
    int integers;   /* inputs are quantised, and sums are int32 */
    int64_t words;  /* of an output in each piece, padded */
    int input_pieces, weight_pieces;
    int tall;       /* inputs of a tile */
} Plan;

/* Whether the system lets this process use AMX's registers, which it has to ask for (Linux, Documentation/x86/xstate). */
static inline int amx_allowed(void) {
#ifdef HAS_AMX
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    static int known; /* 0: not asked yet; threads that ask at once get the same answer */
    if (known == 0) known = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? 1 : -1;
    return known > 0;
#else
    return 0;
#endif
}

/* Outputs whose words lie side by side: those of a tile, and of AMX a whole panel. */
INLINE int64_t strip_of(const Plan *plan) { return plan->way == BY_AMX ? PANEL : WIDE * WIDTH; }
INLINE Strips strips_of(const Plan *plan) { return (Strips){strip_of(plan), strip_of(plan) * plan->words * 4}; }

INLINE int64_t panel_bytes(const Plan *plan) { return plan->words * PANEL * 4 * plan->weight_pieces; }
INLINE int64_t input_bytes(const Plan *plan) { return plan->words * 4; } /* of one piece of one input */

/* Inputs that a product reads as they are given need no place of their own. */
INLINE int is_laid(const Plan *plan) { return plan->integers || plan->way == BY_AMX; }

/* Some inputs, `row` bytes after one another. */
typedef struct {
    const int8_t *at;
    int64_t row;
} Inputs;

INLINE const int8_t *input_at(const Inputs *inputs, int64_t i) { return inputs->at + i * inputs->row; }

#endif
