/* The host's executor: see core.h and host.c. */
#ifndef ASYNC_TIER_HOST_H
#define ASYNC_TIER_HOST_H

#include "core.h"

/* What a thread claims at a time: a load waits for at most one piece per thread. At 5 to 10 GB/s a piece takes 0.2 to
 * 0.4 ms, some thousand times as long as its claim. */
#define PIECE_BYTES ((size_t)2 << 20)
#define MAX_THREADS 256
#define MAX_KERNELS 8 /* kernels have smaller numbers */

typedef struct {
    Core core; /* first: they are freed as one */
    int kernel;
    int thread_count;
    int ready; /* threads that have stored their id; guarded by `core.lock` */
    pthread_t threads[MAX_THREADS];
    long tids[MAX_THREADS];
} Host;

/* Starts threads that serve these queues; NULL and *error if the system refuses them. A thread that becomes free claims
 * a piece of the lowest queue that has one. An ordered queue starts a job only when the one before it has ended, as a
 * CUDA stream does. */
Host *host_open(int threads, int queues, int ordered, int kernel, int *error);
/* Ends the threads: pieces being copied are finished, the rest is cancelled. They never need the GIL, so the caller may
 * hold it. */
void host_close(Host *host);

/* The fastest streaming kernel here, or the portable one. The first call takes a quarter of a second. */
int kernel_best(void);
/* The kernel's number; -1 if this processor supports none of that name. */
int kernel_find(const char *name);
/* The kernel's name; NULL if this processor does not support it, or if there is none with that number. */
const char *kernel_name(int kernel);
void kernel_copy(int kernel, char *dst, const char *src, size_t size);
void kernel_after_fork(void);
/* Backs a range, which starts on a page, with memory. */
void populate(char *start, size_t size);
/* Has a range of new pages take memory from a NUMA node, as far as it has some. Does nothing if the calling thread has
 * a NUMA policy, as set by numactl. 0, or an error. */
int prefer_node(char *start, size_t size, unsigned node);

#endif
