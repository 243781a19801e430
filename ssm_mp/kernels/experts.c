/* Experts as a call of a program: tokens are sorted by expert, and of each expert that has any the weights are read once.
 *
 * Dimensions: m rows (tokens), X experts, c chosen ones a token; q inputs and outputs of an expert, E hidden; choices:
 * pairs of a token and an expert, m · c of them, expert after expert, and in the order of tokens for each.
 */
#include "hidden.h"
#include "program.h"
#include "routing.h"
#include "threads.h"

enum {
    FEW_ROWS = 8,          /* of an expert: with more, a weight is laid out first */
    LEAST_CHOICES = 256,   /* that there is memory for at least */
    COLUMNS = 256,         /* that a thread adds up at a time */
    SMALL_WEIGHT = 1 << 19, /* values up to which a product is too little to be shared among threads */
    LITTLE = 1 << 18       /* values multiplied that are through before a second thread has woken up */
};

/* One projection of one expert. above: outputs of others that come before its own. part: whose time it takes. */
typedef struct {
    Matrix matrix;
    int64_t above, part;
} Projection;

typedef struct {
    Rows x, logits, merit, y; /* [m, q], [m, X], [m, X + groups], [m, q] */
    int64_t adds;             /* to y, or is all that is in y */
    int64_t width, inward;    /* q; projections of inputs: gate and up, or one that is both, or up alone */
    int64_t inward_room, outward_room; /* outputs of such a projection at most, with those above */
    Routing routing;
    Hidden hidden;
    const Projection *projections; /* [X, inward + 1]: of each expert those of inputs, then that of what is hidden */
} Experts;

/* What is known of the choices, and memory for as many of them as are computed at a time. */
typedef struct {
    int32_t *chosen, *order, *active; /* [m, c] experts; [m · c] choices as they are sorted; experts that have any */
    float *weights;                   /* [m, c] */
    int64_t *starts;                  /* [X + 1]: where the choices of each expert begin */
    float *sum;                       /* [m, q] */
    float *x, *hidden, *y;            /* [room, q], [inward, room, inward_room], [room, outward_room] */
    int8_t *products;                 /* for those of all threads */
    int64_t room;
} Work;

INLINE void *taken(uintptr_t *at, int64_t bytes) {
    void *from = (void *)*at;
    *at += (uintptr_t)whole_lines(bytes);
    return from;
}

/* Memory from an address on; from 0 on, the last one says how much. */
static Work work_at(const Experts *e, const Pass *pass, uintptr_t at) {
    const int64_t m = pass->rows, choices = m * e->routing.chosen, word = sizeof(float);
    Work w = {.room = m > LEAST_CHOICES ? m : choices < LEAST_CHOICES ? choices : LEAST_CHOICES};
    w.chosen = taken(&at, choices * word);
    w.order = taken(&at, choices * word);
    w.active = taken(&at, e->routing.experts * word);
    w.weights = taken(&at, choices * word);
    w.starts = taken(&at, (e->routing.experts + 1) * (int64_t)sizeof(int64_t));
    w.sum = taken(&at, m * e->width * word);
    w.x = taken(&at, w.room * e->width * word);
    w.hidden = taken(&at, w.room * e->inward * e->inward_room * word);
    w.y = taken(&at, w.room * e->outward_room * word);
    w.products = (int8_t *)at;
    return w;
}

/* Bytes that a product of so many rows of one expert takes. */
INLINE int64_t product_bytes(const Matrix *matrix, const Pass *pass, int64_t rows, int threads) {
    const int64_t few = scratch_bytes(matrix, pass->few || rows < FEW_ROWS ? rows : FEW_ROWS);
    const int64_t many = pass->few ? 0 : inputs_bytes(matrix, threads);
    return whole_lines(few > many ? few : many);
}

/* Bytes for products of so many rows: by all threads together, or by each for itself. */
static int64_t products_bytes(const Experts *e, int64_t expert, const Pass *pass, int64_t rows, int threads) {
    int64_t most = 0;
    for (int64_t i = 0; i <= e->inward; i++) {
        const int64_t bytes = product_bytes(&e->projections[expert * (e->inward + 1) + i].matrix, pass, rows, threads);
        most = bytes > most ? bytes : most;
    }
    return most;
}

int64_t experts_scratch(const void *what, const Pass *pass) {
    const Experts *e = what;
    int64_t most = 0;
    for (int64_t expert = 0; expert < e->routing.experts; expert++) {
        const int64_t together = products_bytes(e, expert, pass, pass->rows, pass->threads);
        const int64_t each = pass->threads * products_bytes(e, expert, pass, pass->rows, 1);
        most = together > most ? together : most;
        most = each > most ? each : most;
    }
    return (int64_t)(uintptr_t)work_at(e, pass, 0).products + most;
}

static void choose_experts(const Experts *e, const Pass *pass, const Work *w) {
    const Routing *r = &e->routing;
    const int threads = threads_for(pass, pass->rows * r->experts * r->chosen);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < pass->rows; i++)
        route(r, rows_at(pass, &e->logits) + i * e->logits.ld, rows_at(pass, &e->merit) + i * e->merit.ld,
              w->chosen + i * r->chosen, w->weights + i * r->chosen);
}

static void sort_choices(const Experts *e, const Pass *pass, const Work *w) {
    const int64_t X = e->routing.experts, choices = pass->rows * e->routing.chosen;
    memset(w->starts, 0, (X + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < choices; i++) w->starts[w->chosen[i] + 1]++;
    for (int64_t x = 0; x < X; x++) w->starts[x + 1] += w->starts[x];
    for (int64_t i = 0; i < choices; i++) w->order[w->starts[w->chosen[i]]++] = (int32_t)i;
    for (int64_t x = X; x > 0; x--) w->starts[x] = w->starts[x - 1]; /* each was led to the next one's start */
    w->starts[0] = 0;
}

/* Experts at work: those whose choices from `first` on are in memory. */
typedef struct {
    const Experts *experts;
    const Pass *pass;
    const Work *work;
    int64_t first;
    int threads;    /* that share one product */
    double share;   /* of a thread's time that is told */
} Share;

static void project(const Share *s, const Projection *p, int64_t rows, const float *x, int64_t ld, float *y, int64_t ld_y,
                    int8_t *scratch) {
    const Pass *pass = s->pass;
    const double since = seconds_of(pass);
    if (pass->few || rows <= FEW_ROWS)
        multiply(&p->matrix, rows, x, ld, y, ld_y, scratch, s->threads);
    else
        multiply_packed(&p->matrix, NULL, rows, x, ld, NULL, y, ld_y, scratch, s->threads);
    if (!pass->seconds) return;
    const double spent = (seconds_of(pass) - since) * s->share;
#pragma omp atomic
    pass->seconds[p->part] += spent;
}

/* What one expert makes of its tokens. */
static void run_expert(const Share *s, int64_t expert, int8_t *scratch) {
    const Experts *e = s->experts;
    const Work *w = s->work;
    const int64_t from = w->starts[expert], rows = w->starts[expert + 1] - from, at = from - s->first;
    const Projection *own = e->projections + expert * (e->inward + 1), *outward = own + e->inward;
    const int threads = rows * e->width > 1 << 14 ? s->threads : 1;
    float *x = w->x + at * e->width, *hidden[2];
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const int64_t token = w->order[from + i] / e->routing.chosen;
        memcpy(x + i * e->width, rows_at(s->pass, &e->x) + token * e->x.ld, e->width * sizeof(float));
    }
    for (int64_t i = 0; i < e->inward; i++) {
        hidden[i] = w->hidden + (i * w->room + at) * e->inward_room;
        project(s, &own[i], rows, x, e->width, hidden[i], e->inward_room, scratch);
        hidden[i] += own[i].above;
    }
    const float *up = e->inward == 2 ? hidden[1] : hidden[0] + e->hidden.size;
    activate_rows(&e->hidden, rows, hidden[0], e->inward_room, up, e->inward_room, hidden[0], e->inward_room, threads);
    project(s, outward, rows, hidden[0], e->inward_room, w->y + at * e->outward_room, e->outward_room, scratch);
}

/* Whether threads share experts, or else products. */
static int shares_experts(const Experts *e, const Pass *pass, const Work *w, int64_t count) {
    if (pass->threads == 1 || count < 2) return 0;
    if (!pass->few) return count >= pass->threads;
    const Matrix *matrix = &e->projections[w->active[0] * (e->inward + 1)].matrix;
    const int64_t values = matrix->n * matrix->k;
    return values <= SMALL_WEIGHT && values * count * (e->inward + 1) > LITTLE;
}

static void run_active(const Experts *e, const Pass *pass, const Work *w, int64_t first, int64_t count) {
    if (!shares_experts(e, pass, w, count)) {
        const Share share = {e, pass, w, first, pass->threads, 1.0};
        for (int64_t i = 0; i < count; i++) run_expert(&share, w->active[i], w->products);
        return;
    }
    const int threads = count < pass->threads ? (int)count : pass->threads;
    const Share share = {e, pass, w, first, 1, 1.0 / threads};
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t rows = w->starts[w->active[i] + 1] - w->starts[w->active[i]];
        const int64_t bytes = products_bytes(e, w->active[i], pass, rows, 1);
        most = bytes > most ? bytes : most;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < count; i++) run_expert(&share, w->active[i], w->products + thread_number() * most);
}

/* What experts made of choices from `first` up to `end`, weighted, is added to the sums of their tokens; each sum in the
 * order of experts, whatever the number of threads. */
static void add_up(const Experts *e, const Pass *pass, const Work *w, int64_t first, int64_t end) {
    const int threads = threads_for(pass, (end - first) * e->width);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t from = 0; from < e->width; from += COLUMNS) {
        const int64_t to = from + COLUMNS < e->width ? from + COLUMNS : e->width;
        int64_t expert = 0;
        for (int64_t i = first; i < end; i++) {
            while (i >= w->starts[expert + 1]) expert++;
            const int64_t choice = w->order[i], above = e->projections[(expert + 1) * (e->inward + 1) - 1].above;
            const float weight = w->weights[choice], *y = w->y + (i - first) * e->outward_room + above;
            float *sum = w->sum + choice / e->routing.chosen * e->width;
            for (int64_t c = from; c < to; c++) sum[c] += weight * y[c];
        }
    }
}

static void give_sums(const Experts *e, const Pass *pass, const Work *w) {
    const int threads = threads_for(pass, pass->rows * e->width);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < pass->rows; i++) {
        const float *sum = w->sum + i * e->width;
        float *y = rows_at(pass, &e->y) + i * e->y.ld;
        for (int64_t c = 0; c < e->width; c++) y[c] = e->adds ? y[c] + sum[c] : sum[c];
    }
}

void experts_run(const void *what, const Pass *pass) {
    const Experts *e = what;
    const Work w = work_at(e, pass, (uintptr_t)pass->scratch);
    choose_experts(e, pass, &w);
    sort_choices(e, pass, &w);
    memset(w.sum, 0, pass->rows * e->width * sizeof(float));
    for (int64_t expert = 0; expert < e->routing.experts;) {
        const int64_t first = w.starts[expert];
        int64_t count = 0;
        for (; expert < e->routing.experts && w.starts[expert + 1] - first <= w.room; expert++)
            if (w.starts[expert + 1] > w.starts[expert]) w.active[count++] = (int32_t)expert;
        run_active(e, pass, &w, first, count);
        add_up(e, pass, &w, first, w.starts[expert]);
    }
    give_sums(e, pass, &w);
}
