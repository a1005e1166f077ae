/* The core of both engines: jobs, queues, events. It knows neither Python nor how copies are made: that is an executor's
 * (host.c, cuda.c), whose threads claim pieces of jobs here and say when they have ended.
 *
 * Ownership, before any code:
 *
 *   Core    one executor's threads and queues, and the head of the executor's own structure. Shared by the Python object
 *           that stands for it, every `Job` handle and the threads; freed by the last of them (`refs`). Everything in it
 *           below `lock` is guarded by `lock`.
 *   Job     one submitted list of copies, or a range to populate. Owned by its Python handle, by the core until it has
 *           ended, and by whoever works on a piece of it (`refs`).
 *           `state` is the event: written once, under `lock`, with release order; read anywhere without a lock. The
 *           times and the reason are written before it, and read after it only.
 *           The cursor and `outstanding` are guarded by `lock`; the segments never change.
 *   threads never touch Python and never hold `lock` while they copy or call CUDA. They are not joined on the other
 *           side of a fork: `generation` tells a child that it has no threads.
 *
 * `lock` is held for the claim of a piece and for the submission of a job, both O(1) in the number of bytes, so the
 * thread that submits never waits for a copy.
 *
 * Queue 0 goes first, then 1, and so on.
 */
#ifndef ASYNC_TIER_CORE_H
#define ASYNC_TIER_CORE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_QUEUES 8
#define NS_PER_S INT64_C(1000000000)

typedef struct {
    char *dst;
    const char *src;
    size_t size;
} Segment;

/* Where no copy may go on: at `origin` and every `step` bytes after it. A step of 0: nowhere. */
typedef struct {
    uintptr_t origin;
    size_t alignment;
} Grid;

enum { JOB_OPEN, JOB_DONE, JOB_FAILED };

typedef struct Job {
    atomic_int state;
    atomic_int refs;
    int queue;
    int populates;         /* its segment is a range that starts on a page, and has no source */
    int failed;            /* the rest of it will not be claimed */
    int outstanding;       /* pieces that are claimed and have not ended */
    size_t next, next_off; /* first byte not yet claimed */
    size_t count;
    Grid dst_grid, src_grid;
    /* CLOCK_MONOTONIC; 0 for never. Of copies in two legs also the end of the first leg and the start of the second. */
    int64_t started_ns, ended_ns, in_ended_ns, out_started_ns;
    char *reason;   /* why it failed, in words; NULL: because the engine ended */
    void *marks[2]; /* the executor's own */
    struct Job *after;
    Segment segments[];
} Job;

typedef struct {
    Job *head, *tail; /* jobs with bytes left to claim */
    Job *running;     /* ordered queues: claimed to its end, still being copied */
    int ordered;
    long budget; /* pieces that may still be claimed; negative: no limit. The test-only hold of a queue. */
} Queue;

/* Some bytes of a job, from byte `offset` of segment `at` on. */
typedef struct {
    Job *job;
    size_t at, offset, bytes;
    int is_first, is_last;
} Piece;

typedef struct Core {
    atomic_int refs;
    int generation;
    int queue_count;
    size_t piece_bytes;          /* what a thread takes at a time: a smaller job wakes one thread */
    void (*free)(struct Core *); /* of the executor's structure */
    pthread_mutex_t lock;
    pthread_cond_t work, ended; /* their clock is CLOCK_MONOTONIC */
    int waiters;                /* threads in core_wait */
    int signal; /* an eventfd that is written to when a job of copies has ended, or -1; the caller's, who turns it off first */
    atomic_int stop; /* set under `lock`; also read without */
    char *_Atomic broken; /* why the executor can copy no more, in words; NULL while it can. Never changed again */
    Queue queues[MAX_QUEUES];
} Core;

/* Counts the forks this process descends from, so that a child can tell that the parent's threads are not its own.
 * getpid() would say the same for a system call each time. */
extern atomic_int fork_generation;
int core_is_forked(const Core *core);

int64_t now_ns(void);
struct timespec timespec_of(int64_t ns);

void core_init(Core *core, int queues, int ordered, size_t piece_bytes, void (*release)(Core *));
void core_unref(Core *core);
/* A thread of the core's, which signals pass by, with a reference that it drops at its end. 0, or an error. */
int core_start(Core *core, pthread_t *thread, void *(*run)(void *));

/* A job with room for `count` segments and none yet; NULL where there is no memory. */
Job *job_new(size_t count);
void job_unref(Job *job);
/* Neighbours on both sides become one copy. */
void job_add(Job *job, uint64_t dst, uint64_t src, size_t size);
/* Hands the job to the threads. The caller has one reference from now on, and the core one until the job has ended. */
void core_submit(Core *core, int queue, Job *job);
/* Waits until the job has ended, at most for a tenth of a second. */
void core_wait(Core *core, Job *job);

/* lock held, all of these. */
/* Whether a piece of the queue may be taken now. */
int core_may_claim(const Queue *queue);
/* Moves the queue's first job on by one piece; the piece has a reference to the job. */
Piece core_claim(Queue *queue, size_t max_bytes, size_t max_segments);
/* A piece has ended, and with the last one its job; drops the piece's reference. */
void core_settle(Core *core, Job *job);
/* Nothing more of the job is claimed, and it ends as failed, at once where none of it is under way. Takes the reason. */
void core_fail(Core *core, Job *job, char *reason);
/* All that is queued fails. */
void core_cancel(Core *core);

#endif
