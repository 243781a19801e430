/* A gate and a grouped norm as a call of a program.
 *
 * Dimensions: m rows, I inner, G groups of neighbouring channels.
 */
#include "program.h"

void gated_norm(int64_t m, int64_t inner, int64_t groups, const float *y, const float *z, int64_t ld_z,
                const float *weight, float eps, int norm_first, float *out, int threads);

typedef struct {
    Rows y, z; /* y is as wide as its rows, and the outputs come in its place */
    int64_t inner, groups, norm_first;
    const float *weight; /* [I], or none: there is no norm */
    float eps;
} GatedNorm;

void gated_norm_run(const void *what, const Pass *pass) {
    const GatedNorm *g = what;
    float *y = rows_at(pass, &g->y);
    gated_norm(pass->rows, g->inner, g->groups, y, rows_at(pass, &g->z), g->z.ld, g->weight, g->eps,
               g->norm_first != 0, y, threads_for(pass, pass->rows * g->inner));
}
