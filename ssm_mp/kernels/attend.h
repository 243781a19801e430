/* Queries of one sequence that share a head of keys, over the keys and values of all tokens so far.
 *
 * Dimensions: l tokens, s query heads that share keys, e head, t tokens so far.
 */
#ifndef SSM_MP_ATTEND_H
#define SSM_MP_ATTEND_H

#include <stdint.h>

/* Query `row` is head `row % shared` of token `row / shared`. */
typedef struct {
    int64_t shared, width, before;  /* s, e, tokens that were before these */
    const float *q;                 /* [l, s, e] */
    int64_t ld_q, apart;            /* floats from a token's queries to the next one's, from head to head */
    int64_t gate;                   /* floats from a query to its gate; 0: none */
    const float *keys, *values;     /* [t, e] */
    float *y;                       /* [l, s, e], heads side by side */
    int64_t ld_y;
    float scale;                    /* of the scores, times log2 e */
} Queries;

enum { QUERIES = 64 }; /* at a time, of `attend_block` */

/* Up to `QUERIES` rows, of any number of tokens. scratch: `block_floats(e)`. */
void attend_block(const Queries *queries, int64_t from, int64_t rows, float *scratch);
int64_t block_floats(int64_t width);

/* All rows of a single token. scratch: `token_floats(s, e)`. */
void attend_token(const Queries *queries, float *scratch);
int64_t token_floats(int64_t shared, int64_t width);

#endif
