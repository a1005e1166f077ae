/* CUDA's executor: see core.h and cuda.c. */
#ifndef ASYNC_TIER_CUDA_H
#define ASYNC_TIER_CUDA_H

#include "core.h"

/* Queue 0 is the loads', queue 1 the stores'. */
#define DIRECTIONS 2
#define MAX_PIECES 64
/* Of one driver call. (One of 51,828 was seen to hang, vLLM #49276.) */
#define MAX_BATCH 512

/* What one direction may use. */
typedef struct {
    size_t limit;     /* bytes on its streams, at most; but one piece always goes */
    int pieces;       /* and pieces, at most MAX_PIECES */
    uint64_t staging; /* device memory of as many slots of a piece; 0: copies go from side to side in one leg */
} DirectionLimits;

typedef struct Cuda Cuda;

/* A thread with streams of its own in this context; NULL, and why in *error (to be freed; NULL: no memory), where CUDA
 * refuses one. may_batch: whether to use the driver's call for many copies, where it has one. */
Cuda *cuda_open(void *context, int may_batch, size_t piece_bytes, const DirectionLimits limits[DIRECTIONS], char **error);
Core *cuda_core(Cuda *cuda);
int cuda_has_batch(const Cuda *cuda);
/* Handles of a direction's streams; how many. */
int cuda_streams(const Cuda *cuda, int direction, void *handles[2]);
/* Since when the oldest piece has been under way (CLOCK_MONOTONIC); 0: there is none. */
int64_t cuda_oldest_ns(Cuda *cuda);
/* Whether it has ended, and with it all copies. */
int cuda_is_quiet(Cuda *cuda);
/* What the driver has refused to take back; NULL: nothing. After the end. */
const char *cuda_refusal(const Cuda *cuda);

/* Nothing more is started, and jobs not yet begun have failed. */
void cuda_stop(Cuda *cuda);
/* Waits for the end of what is under way and of the thread, at most for a tenth of a second: whether they have ended. */
int cuda_wait_end(Cuda *cuda);
/* Waits no longer: all jobs have failed, and the thread ends with what it is doing: it queues the rest of a piece that it
 * has begun, or gives back what it has if nothing is under way any more. */
void cuda_abandon(Cuda *cuda);

#endif
