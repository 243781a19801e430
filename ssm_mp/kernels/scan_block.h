/* One sequence, as many channels as a register holds, or fewer. Included with NAME and STATES: a constant keeps the
 * states in registers. */

static void NAME(const Scan *s, int64_t b, int64_t from, int count) {
    Register h[STATES], A2[STATES];
    float *state = s->state + (b * s->inner + from) * STATES;
    for (int n = 0; n < STATES; n++) {
        A2[n] = get_part(s->A2t + n * s->inner + from, count);
        float held[WIDTH] = {0};
        for (int i = 0; i < count; i++) held[i] = state[i * STATES + n];
        h[n] = get(held);
    }
    const Register D = get_part(s->D + from, count);
    const float *a = s->a + b * s->length * s->inner + from;
    float *y = s->y + b * s->length * s->inner + from;
    const float *dt = s->dt + b * s->length * s->ld_dt + from;
    const float *z = s->z + b * s->length * s->ld_z + from;
    const float *B = s->B + b * s->length * s->ld_B, *C = s->C + b * s->length * s->ld_C;
    for (int64_t t = 0; t < s->length; t++) {
        __builtin_prefetch(a + AHEAD * s->inner);
        __builtin_prefetch(dt + AHEAD * s->ld_dt);
        __builtin_prefetch(z + AHEAD * s->ld_z);
        const Register x = get_part(a, count), delta = softplus_of(get_part(dt, count)), driven = delta * x;
        Register sum = D * x;
#pragma GCC unroll 16
        for (int n = 0; n < STATES; n++) {
            h[n] = h[n] * decay_of(delta * A2[n]) + driven * B[n];
            sum = sum + h[n] * C[n];
        }
        put_part(y, sum * silu_of(get_part(z, count)), count);
        a += s->inner, y += s->inner, dt += s->ld_dt, z += s->ld_z, B += s->ld_B, C += s->ld_C;
    }
    for (int n = 0; n < STATES; n++) {
        float held[WIDTH];
        put(held, h[n]);
        for (int i = 0; i < count; i++) state[i * STATES + n] = held[i];
    }
}
