/* CUDA's executor: see core.h and cuda.c. */
#ifndef ASYNC_TIER_CUDA_H
#define ASYNC_TIER_CUDA_H

#include "core.h"

/* Queue 0 is for loads, queue 1 for stores. */
#define DIRECTIONS 2
#define MAX_PIECES 64
/* Copies of one driver call, at most. (A call of 51,828 was seen to hang, vLLM #49276.) */
#define MAX_BATCH 512

/* What one direction may use. */
typedef struct {
    size_t limit;     /* bytes on its streams, at most; but one piece may always be there */
    int pieces;       /* pieces on its streams, at most; not above MAX_PIECES */
    uint64_t staging; /* address of device memory with a slot for each of these pieces; 0: copies take one leg */
} DirectionLimits;

typedef struct Cuda Cuda;

/* Starts a thread with streams of its own in this context. If CUDA refuses: NULL, and the reason in *error, which the
 * caller frees (NULL: no memory). may_batch: use the driver's call for many copies, if it has one. */
Cuda *cuda_open(void *context, int may_batch, size_t piece_bytes, const DirectionLimits limits[DIRECTIONS],
                char **error);
Core *cuda_core(Cuda *cuda);
int cuda_has_batch(const Cuda *cuda);
/* The handles of a direction's streams. Returns their number. */
int cuda_streams(const Cuda *cuda, int direction, void *handles[2]);
/* Since when the oldest piece has been under way, on CLOCK_MONOTONIC; 0: none is. */
int64_t cuda_oldest_ns(Cuda *cuda);
/* Whether the thread has ended, and all copies before it. */
int cuda_is_quiet(Cuda *cuda);
/* Why the driver refused to destroy streams or events; NULL: it did not. Only after the end. */
const char *cuda_refusal(const Cuda *cuda);

/* Starts no more pieces. Jobs that are still queued fail. */
void cuda_stop(Cuda *cuda);
/* Waits, for a tenth of a second at most, for the copies under way and the thread to end. Whether they have. */
int cuda_wait_end(Cuda *cuda);
/* Gives up waiting: all jobs fail. The thread ends when it has done what it is doing: queueing the rest of a piece or,
 * if nothing is under way, destroying its streams and events. */
void cuda_abandon(Cuda *cuda);

#endif
