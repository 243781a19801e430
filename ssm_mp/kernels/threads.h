/* Which thread of a parallel loop runs. */
#ifndef SSM_MP_THREADS_H
#define SSM_MP_THREADS_H

#include "vector.h"

#ifdef _OPENMP
int omp_get_thread_num(void); /* its header belongs to a library that a compiler may come without */
INLINE int thread_number(void) { return omp_get_thread_num(); }
#else
INLINE int thread_number(void) { return 0; }
#endif

#endif
