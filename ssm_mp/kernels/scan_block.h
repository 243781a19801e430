/* One sequence, up to sixteen channels. Included with NAME and STATES: a constant keeps the states in registers. */

static void NAME(const Scan *s, int64_t b, int64_t from, int count) {
    v16 h[STATES], A2[STATES];
    float *state = s->state + (b * s->inner + from) * STATES;
    for (int n = 0; n < STATES; n++) {
        A2[n] = load_part(s->A2t + n * s->inner + from, count);
        float held[LANES] = {0};
        for (int i = 0; i < count; i++) held[i] = state[i * STATES + n];
        h[n] = load(held);
    }
    const v16 D = load_part(s->D + from, count);
    const float *a = s->a + b * s->length * s->inner + from;
    float *y = s->y + b * s->length * s->inner + from;
    const float *dt = s->dt + b * s->length * s->ld_dt + from;
    const float *z = s->z + b * s->length * s->ld_z + from;
    const float *B = s->B + b * s->length * s->ld_B, *C = s->C + b * s->length * s->ld_C;
    for (int64_t t = 0; t < s->length; t++) {
        __builtin_prefetch(a + AHEAD * s->inner);
        __builtin_prefetch(dt + AHEAD * s->ld_dt);
        __builtin_prefetch(z + AHEAD * s->ld_z);
        const v16 x = load_part(a, count);
        const v16 delta = softplus16(load_part(dt, count));
        const v16 driven = delta * x;
        v16 sum = D * x;
#pragma GCC unroll 16
        for (int n = 0; n < STATES; n++) {
            h[n] = h[n] * exp2_16(delta * A2[n]) + driven * splat(B[n]);
            sum = sum + h[n] * splat(C[n]);
        }
        store_part(y, sum * silu16(load_part(z, count)), count);
        a += s->inner, y += s->inner, dt += s->ld_dt, z += s->ld_z, B += s->ld_B, C += s->ld_C;
    }
    for (int n = 0; n < STATES; n++) {
        float held[LANES];
        store(held, h[n]);
        for (int i = 0; i < count; i++) state[i * STATES + n] = held[i];
    }
}
