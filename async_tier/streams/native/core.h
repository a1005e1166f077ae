/* The core of both engines: jobs, queues, events. It knows neither Python nor how copies are made. An executor (host.c,
 * cuda.c) makes them: its threads claim pieces of jobs here and report when these have ended.
 *
 * Ownership, before any code:
 *
 *   Core    one executor's queues and threads; the first member of the executor's own structure. Shared by the engine's
 *           Python object, every `Job` handle and the threads; the last of them frees it (`refs`). Everything in it
 *           below `lock` is guarded by `lock`.
 *   Job     one submitted list of copies, or a range to populate. Owned by its Python handle, by the core until it has
 *           ended, and by each claimed piece (`refs`).
 *           `state` is the event: written once, under `lock`, with release order; read anywhere without a lock. The
 *           times and the reason are written before it and only read after it.
 *           The cursor and `outstanding` are guarded by `lock`; the segments never change.
 *   threads never touch Python, and never hold `lock` while they copy or call CUDA. A forked child has none of them
 *           and must not join them: it can tell by `generation`.
 *
 * `lock` is held to claim a piece and to submit a job. Both take the same time for any number of bytes, so whoever
 * submits never waits for a copy.
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

/* Boundaries that no copy may cross: `origin`, and every `alignment` bytes after it. An alignment of 0: none. */
typedef struct {
    uintptr_t origin;
    size_t alignment;
} Grid;

enum { JOB_OPEN, JOB_DONE, JOB_FAILED };

typedef struct Job {
    atomic_int state;
    atomic_int refs;
    int queue;
    int populates;         /* its only segment is a range to populate, which starts on a page and has no source */
    int failed;            /* the rest of it will not be claimed */
    int outstanding;       /* pieces that were claimed and have not ended */
    size_t next, next_off; /* first byte not yet claimed */
    size_t count;
    Grid dst_grid, src_grid;
    /* On CLOCK_MONOTONIC; 0: never. Copies in two legs also have the end of the first and the start of the second. */
    int64_t started_ns, ended_ns, in_ended_ns, out_started_ns;
    char *reason;   /* why it failed; NULL: because the engine ended */
    void *marks[2]; /* for the executor's use */
    struct Job *after;
    Segment segments[];
} Job;

typedef struct {
    Job *head, *tail; /* jobs with bytes left to claim */
    Job *running;     /* ordered queues: the job that is claimed to its end and still being copied */
    int ordered;
    long budget; /* pieces that may still be claimed; negative: no limit. Only tests set it, to hold a queue. */
} Queue;

/* Some bytes of a job, starting at byte `offset` of segment `at`. */
typedef struct {
    Job *job;
    size_t at, offset, bytes;
    int is_first, is_last;
} Piece;

typedef struct Core {
    atomic_int refs;
    int generation;
    int queue_count;
    size_t piece_bytes;          /* what a thread claims at a time: a job of one piece wakes only one thread */
    void (*free)(struct Core *); /* of the executor's structure */
    pthread_mutex_t lock;
    pthread_cond_t work, ended; /* their clock is CLOCK_MONOTONIC */
    int waiters;                /* threads in core_wait */
    int signal; /* -1, or the caller's eventfd, to write to when a job of copies ends; set to -1 before it is closed */
    atomic_int stop;      /* set under `lock`; also read without it */
    char *_Atomic broken; /* why the executor can copy no more; NULL while it can. Set once */
    Queue queues[MAX_QUEUES];
} Core;

/* Counts the forks that led to this process, so that a child knows that it has none of the parent's threads. getpid()
 * would tell, too, but by a system call each time. */
extern atomic_int fork_generation;
int core_is_forked(const Core *core);

int64_t now_ns(void);
struct timespec timespec_of(int64_t ns);

void core_init(Core *core, int queues, int ordered, size_t piece_bytes, void (*release)(Core *));
void core_unref(Core *core);
/* Starts a thread that receives no signals. It holds a reference to the core until it ends. 0, or an error. */
int core_start(Core *core, pthread_t *thread, void *(*run)(void *));

/* A job without segments, with room for `count`; NULL if there is no memory. */
Job *job_new(size_t count);
void job_unref(Job *job);
/* Adds a segment, or extends the last one if it adjoins that on both sides. */
void job_add(Job *job, uint64_t dst, uint64_t src, size_t size);
/* Queues the job. The caller keeps its reference; the core has one of its own until the job has ended. */
void core_submit(Core *core, int queue, Job *job);
/* Waits until the job has ended, at most for a tenth of a second. */
void core_wait(Core *core, Job *job);

/* All of these: lock held. */
/* Whether a piece of the queue may be claimed now. */
int core_may_claim(const Queue *queue);
/* Claims the next piece of the queue's first job. The piece has a reference to the job. */
Piece core_claim(Queue *queue, size_t max_bytes, size_t max_segments);
/* A piece has ended, and its job with the last piece. Drops the piece's reference. */
void core_settle(Core *core, Job *job);
/* No more pieces of the job are claimed; it fails once none is outstanding. Takes over the reason. */
void core_fail(Core *core, Job *job, char *reason);
/* All queued jobs fail. */
void core_cancel(Core *core);

#endif
