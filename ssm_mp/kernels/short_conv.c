/* The product of two values, number by number, as a call of a program. */
#include "program.h"
#include "register.h"

typedef struct {
    Rows x, z, y;
    int64_t width;
} Times;

/* y = x · z; y may be one of them. */
void times_run(const void *what, const Pass *pass) {
    const Times *s = what;
    const float *x = rows_at(pass, &s->x), *z = rows_at(pass, &s->z);
    float *y = rows_at(pass, &s->y);
    const int threads = threads_for(pass, pass->rows * s->width);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < pass->rows; i++)
        for (int64_t c = 0; c < s->width; c += WIDTH) {
            const int64_t left = s->width - c;
            put_part(y + i * s->y.ld + c, get_part(x + i * s->x.ld + c, left) * get_part(z + i * s->z.ld + c, left), left);
        }
}
