/* The host's executor: see core.h and host.c. */
#ifndef ASYNC_TIER_HOST_H
#define ASYNC_TIER_HOST_H

#include "core.h"

/* The unit in which a thread takes work: a load waits for at most one of these per thread. At 5 to 10 GB/s it is
 * 0.2 to 0.4 ms, some thousand times the cost of claiming it. */
#define PIECE_BYTES ((size_t)2 << 20)
#define MAX_THREADS 256
#define MAX_KERNELS 8 /* numbers of kernels are below it */

typedef struct {
    Core core; /* first: they are freed as one */
    int kernel;
    int thread_count;
    int ready; /* threads that have told their id; below `core.lock` */
    pthread_t threads[MAX_THREADS];
    long tids[MAX_THREADS];
} Host;

/* Threads that serve these queues; NULL, and an error, where the system refuses them. A thread that becomes free takes
 * a piece of the lowest queue that has one. An ordered queue starts a job only when the one before it has ended, as a
 * CUDA stream does. */
Host *host_open(int threads, int queues, int ordered, int kernel, int *error);
/* Ends the threads: pieces being copied are finished, the rest is cancelled. They never need the GIL, so the caller may
 * have it or not. */
void host_close(Host *host);

/* The fastest streaming kernel here, or the portable one. The first call takes a quarter of a second. */
int kernel_best(void);
/* -1: there is none of that name here. */
int kernel_find(const char *name);
/* NULL: this processor does not support it, or there is none of that number. */
const char *kernel_name(int kernel);
void kernel_copy(int kernel, char *dst, const char *src, size_t size);
void kernel_after_fork(void);
/* Backs the pages of a range, which starts on a page, with memory. */
void populate(char *start, size_t size);
/* Has new memory, whole pages, come from a NUMA node as long as that has some; not where the thread that asks was given a
 * policy, by numactl, say. 0, or an error. */
int prefer_node(char *start, size_t size, unsigned node);

#endif
