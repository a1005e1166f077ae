/* _host_copy: native copy threads with the semantics of streams and events. They also back new memory with pages.
 *
 * Ownership, before any code:
 *
 *   Core    one set of threads and its queues. Shared by the Python object `Engine`, every `Job` handle and the
 *           threads; freed by the last of them (`refs`). Everything in it below `lock` is guarded by `lock`.
 *   Job     one submitted list of copies, or a range to populate. Owned by its Python handle and, until it has ended, by
 *           the core (`refs`).
 *           `state` is the event: written once, under `lock`, with release order; read anywhere without a lock.
 *           The cursor, `outstanding` and the times are guarded by `lock`; the segments never change.
 *   threads run `worker`. They never touch Python and never hold `lock` while they copy. They are not joined on the
 *           other side of a fork: `Core.generation` tells a child that it has no threads.
 *
 * `lock` is held for the claim of a piece (at most PIECE_BYTES) and for the submission of a job, both O(1) in the
 * number of bytes, so the thread that submits never waits for a copy.
 *
 * Queue 0 goes first, then 1, and so on: a thread that becomes free takes a piece of the lowest queue that has one.
 * An ordered queue starts a job only when the one before it has ended, as a CUDA stream does.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAVE_X86 1
#endif

/* The unit in which a thread takes work: a load waits for at most one of these per thread. At 5 to 10 GB/s it is
 * 0.2 to 0.4 ms, some thousand times the cost of claiming it. */
#define PIECE_BYTES ((size_t)2 << 20)
#define PAGE 4096
/* Since Linux 5.14 (include/uapi/asm-generic/mman-common.h); older C libraries do not name it. */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
/* What the kernels are measured with: beyond the caches that cores share, as the rows of a tier are. In those all
 * kernels may be alike that differ by a fifth in memory (seen on an AMD EPYC with 8 MiB). A quarter of a second in all. */
#define CALIBRATION_BYTES ((size_t)64 << 20)
/* Bounds how long the claim of a piece of very small copies holds the lock: some microseconds. */
#define PIECE_SEGMENTS 1024
/* Below this a cached copy is as fast, and what it leaves in the cache is small. */
#define STREAM_MIN_BYTES 4096
#define LINE 64
#define MAX_THREADS 256
#define MAX_QUEUES 8

/* ------------------------------------------------------------------------------------------------ copy kernels
 *
 * Streaming stores bypass the caches, which stay with the model, and spare the read of the destination that an
 * ordinary store begins with. How many pages to walk in step is the processor's secret: on some, several pages keep
 * as many prefetchers busy and one page after the other loses a quarter; on AMD's Zen 3 eight pages overrun the
 * write-combining buffers and lose five sixths. So the kernels are measured, once a process, and the best one taken.
 */

typedef void (*copy_fn)(char *dst, const char *src, size_t n);

static void copy_portable(char *dst, const char *src, size_t n) { memcpy(dst, src, n); }

#ifdef HAVE_X86
/* Ahead of the line being read; a prefetch past the end of the memory does nothing. */
#define PREFETCH_AHEAD 512

#define LINE_AVX2(d, s)                                                                                                \
    do {                                                                                                               \
        __m256i low = _mm256_loadu_si256((const __m256i *)(s));                                                        \
        __m256i high = _mm256_loadu_si256((const __m256i *)(s) + 1);                                                   \
        _mm256_stream_si256((__m256i *)(d), low);                                                                      \
        _mm256_stream_si256((__m256i *)(d) + 1, high);                                                                 \
    } while (0)

#define LINE_AVX512(d, s) _mm512_stream_si512((__m512i *)(d), _mm512_loadu_si512((const void *)(s)))

/* A kernel that walks `pages` pages in step, a 64-byte line of each in turn, and the rest line by line. */
#define STREAMING_KERNEL(name, instructions, pages, copy_line)                                                         \
    __attribute__((target(instructions))) static void name(char *dst, const char *src, size_t n) {                    \
        if (n < STREAM_MIN_BYTES) {                                                                                    \
            memcpy(dst, src, n);                                                                                       \
            return;                                                                                                    \
        }                                                                                                              \
        size_t head = (size_t)(-(uintptr_t)dst & (LINE - 1));                                                          \
        memcpy(dst, src, head);                                                                                        \
        dst += head, src += head, n -= head;                                                                           \
        if (pages > 1)                                                                                                 \
            for (; n >= pages * PAGE; dst += pages * PAGE, src += pages * PAGE, n -= pages * PAGE)                     \
                for (size_t off = 0; off < PAGE; off += LINE)                                                          \
                    for (size_t page = 0; page < pages; page++)                                                        \
                        copy_line(dst + page * PAGE + off, src + page * PAGE + off);                                   \
        for (; n >= 2 * LINE; dst += 2 * LINE, src += 2 * LINE, n -= 2 * LINE) {                                       \
            _mm_prefetch(src + PREFETCH_AHEAD, _MM_HINT_T0);                                                           \
            _mm_prefetch(src + PREFETCH_AHEAD + LINE, _MM_HINT_T0);                                                    \
            copy_line(dst, src);                                                                                       \
            copy_line(dst + LINE, src + LINE);                                                                         \
        }                                                                                                              \
        memcpy(dst, src, n);                                                                                           \
        _mm_sfence(); /* streaming stores are weakly ordered: the event must not overtake them */                      \
    }

STREAMING_KERNEL(copy_avx2_x1, "avx2", 1, LINE_AVX2)
STREAMING_KERNEL(copy_avx2_x4, "avx2", 4, LINE_AVX2)
STREAMING_KERNEL(copy_avx2_x8, "avx2", 8, LINE_AVX2)
STREAMING_KERNEL(copy_avx512_x1, "avx512f", 1, LINE_AVX512)
STREAMING_KERNEL(copy_avx512_x4, "avx512f", 4, LINE_AVX512)
STREAMING_KERNEL(copy_avx512_x8, "avx512f", 8, LINE_AVX512)

static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
static int has_avx512(void) { return __builtin_cpu_supports("avx512f"); }
#endif

static int always(void) { return 1; }

/* The portable kernel is last, and is taken only where no other is supported. */
static const struct {
    const char *name;
    copy_fn copy;
    int (*supported)(void);
} KERNELS[] = {
#ifdef HAVE_X86
    {"avx512x8", copy_avx512_x8, has_avx512},
    {"avx512x4", copy_avx512_x4, has_avx512},
    {"avx512x1", copy_avx512_x1, has_avx512},
    {"avx2x8", copy_avx2_x8, has_avx2},
    {"avx2x4", copy_avx2_x4, has_avx2},
    {"avx2x1", copy_avx2_x1, has_avx2},
#endif
    {"portable", copy_portable, always},
};
#define KERNEL_COUNT ((int)(sizeof KERNELS / sizeof KERNELS[0]))

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static pthread_mutex_t calibration = PTHREAD_MUTEX_INITIALIZER;

/* The fastest streaming kernel here, or the portable one. The first call takes a quarter of a second; call it without the GIL. */
static int best_kernel(void) {
    static int best = -1;
    pthread_mutex_lock(&calibration);
    if (best < 0) {
        int64_t best_ns = INT64_MAX;
        char *memory = malloc(2 * CALIBRATION_BYTES);
        best = KERNEL_COUNT - 1;
        if (memory)
            memset(memory, 1, 2 * CALIBRATION_BYTES);
        for (int turn = 0; memory && turn < 3; turn++) /* the best of three: neighbours make noise */
            for (int i = 0; i < KERNEL_COUNT - 1; i++) {
                if (!KERNELS[i].supported())
                    continue;
                int64_t started = now_ns();
                KERNELS[i].copy(memory, memory + CALIBRATION_BYTES, CALIBRATION_BYTES);
                int64_t took = now_ns() - started;
                if (took < best_ns)
                    best_ns = took, best = i;
            }
        free(memory);
    }
    pthread_mutex_unlock(&calibration);
    return best;
}

/* The kernel called `name`, or the best one for NULL. -1, with an exception set, if there is none. */
static int find_kernel(const char *name) {
    int found = -1;
    if (name == NULL) {
        Py_BEGIN_ALLOW_THREADS
        found = best_kernel();
        Py_END_ALLOW_THREADS
        return found;
    }
    for (int i = 0; i < KERNEL_COUNT && found < 0; i++)
        if (KERNELS[i].supported() && strcmp(name, KERNELS[i].name) == 0)
            found = i;
    if (found < 0)
        PyErr_Format(PyExc_ValueError, "copy kernel '%s' is unknown or not supported by this processor", name);
    return found;
}

/* ---------------------------------------------------------------------------------------------------- population */

/* Back the pages of a range with memory, so that no copy pays for their faults. Where the kernel refuses, faults do the
 * same later.
 *
 * It holds the lock of the process's memory map, for which any thread has to wait that maps or unmaps something, be it in
 * malloc: so at most PIECE_BYTES a call, a huge page. (32 MiB at once held a scheduler up for 15 to 45 ms.) */
static void populate_piece(char *start, size_t size) {
    (void)madvise(start, size, MADV_POPULATE_WRITE);
}

/* --------------------------------------------------------------------------------------------- jobs and the core */

enum { JOB_OPEN, JOB_DONE, JOB_CANCELLED };

typedef struct {
    char *dst;
    const char *src;
    size_t size;
} Segment;

typedef struct Job {
    atomic_int state;
    atomic_int refs;
    int queue;
    int populates;         /* its segment is a range that starts on a page, and has no source */
    int cancelled;         /* the rest of it will not be claimed */
    int outstanding;       /* pieces being copied now */
    size_t next, next_off; /* first byte not yet claimed */
    size_t count;
    int64_t started_ns, ended_ns; /* CLOCK_MONOTONIC */
    struct Job *after;
    Segment segments[];
} Job;

typedef struct {
    Job *head, *tail; /* jobs with bytes left to claim */
    Job *running;     /* ordered queues: claimed to its end, still being copied */
    int ordered;
    long budget; /* pieces that may still be claimed; negative: no limit. The test-only hold of a queue. */
} Queue;

typedef struct {
    atomic_int refs;
    int generation;
    int kernel;
    int thread_count, queue_count;
    pthread_t threads[MAX_THREADS];
    pthread_mutex_t lock;
    pthread_cond_t work, ended;
    int waiters; /* threads in job_wait */
    int ready;   /* threads that have told their id */
    int signal;  /* an eventfd that is written to when a job of copies has ended, or -1; the caller's, who turns it off first */
    int stop;
    long tids[MAX_THREADS];
    Queue queues[MAX_QUEUES];
} Core;

/* Counts the forks this process descends from, so that a child can tell that the parent's threads are not its own.
 * getpid() would say the same for a system call each time. */
static atomic_int fork_generation;

static void in_forked_child(void) {
    atomic_fetch_add(&fork_generation, 1);
    pthread_mutex_init(&calibration, NULL); /* whoever held it stayed with the parent */
}

static void job_unref(Job *job) {
    if (atomic_fetch_sub(&job->refs, 1) == 1)
        free(job);
}

static void core_unref(Core *core) {
    if (atomic_fetch_sub(&core->refs, 1) != 1)
        return;
    pthread_mutex_destroy(&core->lock);
    pthread_cond_destroy(&core->work);
    pthread_cond_destroy(&core->ended);
    free(core);
}

/* lock held. The one place where a job ends; drops the core's reference. */
static void end_job(Core *core, Job *job) {
    Queue *queue = &core->queues[job->queue];
    job->ended_ns = now_ns();
    atomic_store_explicit(&job->state, job->cancelled ? JOB_CANCELLED : JOB_DONE, memory_order_release);
    if (queue->running == job) {
        queue->running = NULL;
        if (queue->head)
            pthread_cond_broadcast(&core->work);
    }
    if (core->waiters)
        pthread_cond_broadcast(&core->ended);
    if (core->signal >= 0 && !job->populates) {
        /* Full or gone: then it is readable, or nobody reads it. */
        ssize_t ignored = write(core->signal, &(uint64_t){1}, sizeof(uint64_t));
        (void)ignored;
    }
    job_unref(job);
}

/* lock held. The first queue with a piece that may be taken now, or NULL. */
static Queue *claimable(Core *core) {
    for (int i = 0; i < core->queue_count; i++) {
        Queue *queue = &core->queues[i];
        if (queue->head && queue->budget != 0 && !(queue->ordered && queue->running))
            return queue;
    }
    return NULL;
}

static void *worker(void *argument) {
    Core *core = argument;
    const copy_fn copy = KERNELS[core->kernel].copy;
    pthread_setname_np(pthread_self(), "async-tier-copy");
    pthread_mutex_lock(&core->lock);
    core->tids[core->ready++] = syscall(SYS_gettid);
    pthread_cond_broadcast(&core->ended);
    while (!core->stop) {
        Queue *queue = claimable(core);
        if (queue == NULL) {
            pthread_cond_wait(&core->work, &core->lock);
            continue;
        }
        Job *job = queue->head;
        size_t at = job->next, off = job->next_off, left = PIECE_BYTES;
        while (job->next < job->count && left > 0 && job->next - at < PIECE_SEGMENTS) { /* move the cursor by one piece */
            size_t rest = job->segments[job->next].size - job->next_off;
            if (rest > left) {
                job->next_off += left;
                left = 0;
            } else {
                left -= rest;
                job->next++, job->next_off = 0;
            }
        }
        if (queue->budget > 0)
            queue->budget--;
        job->outstanding++;
        if (job->next == job->count) {
            queue->head = job->after;
            if (queue->head == NULL)
                queue->tail = NULL;
            if (queue->ordered)
                queue->running = job;
        }
        if (job->started_ns == 0)
            job->started_ns = now_ns();
        pthread_mutex_unlock(&core->lock);

        for (size_t todo = PIECE_BYTES - left; todo > 0; at++, off = 0) {
            const Segment *segment = &job->segments[at];
            size_t size = segment->size - off < todo ? segment->size - off : todo;
            if (job->populates)
                populate_piece(segment->dst + off, size);
            else
                copy(segment->dst + off, segment->src + off, size);
            todo -= size;
        }

        pthread_mutex_lock(&core->lock);
        if (--job->outstanding == 0 && (job->next == job->count || job->cancelled))
            end_job(core, job);
    }
    pthread_mutex_unlock(&core->lock);
    core_unref(core);
    return NULL;
}

/* Ends the threads; they never need the GIL, so the caller may have it or not: pieces being copied are finished, the rest is cancelled. */
static void core_close(Core *core) {
    pthread_mutex_lock(&core->lock);
    int first = !core->stop;
    core->stop = 1;
    for (int i = 0; i < core->queue_count; i++) {
        Queue *queue = &core->queues[i];
        for (Job *job = queue->head, *after; job; job = after) {
            after = job->after;
            job->cancelled = 1;
            if (job->outstanding == 0)
                end_job(core, job);
        }
        queue->head = queue->tail = NULL;
    }
    pthread_cond_broadcast(&core->work);
    pthread_mutex_unlock(&core->lock);
    if (first)
        for (int i = 0; i < core->thread_count; i++)
            pthread_join(core->threads[i], NULL);
}

/* ---------------------------------------------------------------------------------------------- the Job handle */

typedef struct {
    PyObject_HEAD
    Core *core;
    Job *job;
} JobObject;

static PyTypeObject *job_type;

static int check_generation(const Core *core) {
    if (core->generation == atomic_load(&fork_generation))
        return 0;
    PyErr_SetString(PyExc_RuntimeError,
                    "this copy engine belongs to the parent process: its threads do not exist after a fork; construct "
                    "a new engine in the child");
    return -1;
}

static void job_dealloc(PyObject *self) {
    JobObject *handle = (JobObject *)self;
    if (handle->job)
        job_unref(handle->job);
    if (handle->core)
        core_unref(handle->core);
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *job_is_done(PyObject *self, void *unused) {
    JobObject *handle = (JobObject *)self;
    int state = atomic_load_explicit(&handle->job->state, memory_order_acquire);
    if (state == JOB_OPEN && check_generation(handle->core))
        return NULL;
    return PyBool_FromLong(state != JOB_OPEN);
}

static PyObject *job_failed(PyObject *self, void *unused) {
    int state = atomic_load_explicit(&((JobObject *)self)->job->state, memory_order_acquire);
    return PyBool_FromLong(state == JOB_CANCELLED);
}

static PyObject *job_seconds(PyObject *self, void *unused) {
    Job *job = ((JobObject *)self)->job;
    if (atomic_load_explicit(&job->state, memory_order_acquire) == JOB_OPEN || job->started_ns == 0)
        return PyFloat_FromDouble(0.0);
    return PyFloat_FromDouble((double)(job->ended_ns - job->started_ns) * 1e-9);
}

/* The times are published with the state. */
static PyObject *job_started_ns(PyObject *self, void *unused) {
    Job *job = ((JobObject *)self)->job;
    int open = atomic_load_explicit(&job->state, memory_order_acquire) == JOB_OPEN;
    return PyLong_FromLongLong(open ? 0 : job->started_ns);
}

static PyObject *job_ended_ns(PyObject *self, void *unused) {
    Job *job = ((JobObject *)self)->job;
    int open = atomic_load_explicit(&job->state, memory_order_acquire) == JOB_OPEN;
    return PyLong_FromLongLong(open ? 0 : job->ended_ns);
}

static PyObject *job_synchronize(PyObject *self, PyObject *unused) {
    JobObject *handle = (JobObject *)self;
    Core *core = handle->core;
    if (atomic_load_explicit(&handle->job->state, memory_order_acquire) != JOB_OPEN)
        Py_RETURN_NONE;
    if (check_generation(core))
        return NULL;
    int state;
    do { /* in slices, so that Ctrl-C is heard */
        Py_BEGIN_ALLOW_THREADS
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 100 * 1000 * 1000;
        if (until.tv_nsec >= 1000 * 1000 * 1000)
            until.tv_nsec -= 1000 * 1000 * 1000, until.tv_sec++;
        pthread_mutex_lock(&core->lock);
        core->waiters++;
        if (atomic_load(&handle->job->state) == JOB_OPEN)
            pthread_cond_timedwait(&core->ended, &core->lock, &until);
        core->waiters--;
        pthread_mutex_unlock(&core->lock);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals())
            return NULL;
        state = atomic_load_explicit(&handle->job->state, memory_order_acquire);
    } while (state == JOB_OPEN);
    Py_RETURN_NONE;
}

static PyGetSetDef job_getset[] = {
    {"is_done", job_is_done, NULL, "Whether every copy of the job has ended. Never blocks.", NULL},
    {"failed", job_failed, NULL, "Whether the engine was closed before the job was copied.", NULL},
    {"seconds", job_seconds, NULL, "Time from the first copy's start to the last one's end; 0.0 before.", NULL},
    {"started_ns", job_started_ns, NULL, "CLOCK_MONOTONIC at the first copy's start; 0 before the job has ended.", NULL},
    {"ended_ns", job_ended_ns, NULL, "CLOCK_MONOTONIC when the job ended; 0 before.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef job_methods[] = {
    {"synchronize", job_synchronize, METH_NOARGS, "Block until the job has ended, without the GIL."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot job_slots[] = {
    {Py_tp_dealloc, job_dealloc},
    {Py_tp_getset, job_getset},
    {Py_tp_methods, job_methods},
    {Py_tp_doc, "The event of one submitted list of copies."},
    {0, NULL},
};
static PyType_Spec job_spec = {
    "async_tier._host_copy.Job", sizeof(JobObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, job_slots};

/* ------------------------------------------------------------------------------------------------- the Engine */

typedef struct {
    PyObject_HEAD
    Core *core;
} EngineObject;

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"threads", "queues", "ordered", "kernel", NULL};
    int threads, queues, ordered = 0;
    const char *kernel = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ii|pz", names, &threads, &queues, &ordered, &kernel))
        return NULL;
    if (threads < 1 || threads > MAX_THREADS || queues < 1 || queues > MAX_QUEUES) {
        PyErr_Format(PyExc_ValueError, "threads must be 1 to %d and queues 1 to %d, not %d and %d", MAX_THREADS,
                     MAX_QUEUES, threads, queues);
        return NULL;
    }
    int kernel_index = find_kernel(kernel);
    if (kernel_index < 0)
        return NULL;
    Core *core = calloc(1, sizeof *core);
    if (core == NULL)
        return PyErr_NoMemory();
    atomic_init(&core->refs, 1);
    core->generation = atomic_load(&fork_generation);
    core->kernel = kernel_index;
    core->queue_count = queues;
    core->signal = -1;
    for (int i = 0; i < queues; i++) {
        core->queues[i].ordered = ordered;
        core->queues[i].budget = -1;
    }
    pthread_mutex_init(&core->lock, NULL);
    pthread_cond_init(&core->work, NULL);
    pthread_cond_init(&core->ended, NULL);

    /* Signals belong to Python's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    for (; core->thread_count < threads && error == 0; core->thread_count += error == 0) {
        atomic_fetch_add(&core->refs, 1);
        error = pthread_create(&core->threads[core->thread_count], NULL, worker, core);
        if (error)
            atomic_fetch_sub(&core->refs, 1);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&core->lock);
    while (core->ready < core->thread_count)
        pthread_cond_wait(&core->ended, &core->lock);
    pthread_mutex_unlock(&core->lock);
    Py_END_ALLOW_THREADS

    EngineObject *self = NULL;
    if (error == 0)
        self = (EngineObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    else
        PyErr_Format(PyExc_RuntimeError, "cannot start %d copy threads: %s", threads, strerror(error));
    if (self == NULL) {
        core_close(core);
        core_unref(core);
        return NULL;
    }
    self->core = core;
    return (PyObject *)self;
}

static PyObject *engine_close(PyObject *self, PyObject *unused) {
    Core *core = ((EngineObject *)self)->core;
    if (core->generation == atomic_load(&fork_generation)) {
        Py_BEGIN_ALLOW_THREADS
        core_close(core);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

static void engine_dealloc(PyObject *self) {
    Core *core = ((EngineObject *)self)->core;
    if (core) {
        /* An engine that nobody closed: its threads must not outlive the memory they copy. In a forked child there
         * are none, and the lock may be one that a thread of the parent held. */
        if (core->generation == atomic_load(&fork_generation)) {
            core_close(core);
            core_unref(core);
        }
    }
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* An address array: contiguous, integers of 8 bytes. */
static int get_words(PyObject *object, Py_buffer *view, const char *name) {
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT))
        return -1;
    const char *format = view->format ? view->format : "B";
    if (view->itemsize == 8 && strchr("QLNqln", format[strlen(format) - 1]) && !strchr(">!", format[0]))
        return 0;
    PyErr_Format(PyExc_TypeError, "%s must hold native 8-byte integers, not %zd-byte items of format '%s'", name, view->itemsize,
                 format);
    PyBuffer_Release(view);
    return -1;
}

static int check_queue(const Core *core, int queue_index) {
    if (queue_index >= 0 && queue_index < core->queue_count)
        return 0;
    PyErr_Format(PyExc_ValueError, "queue must be 0 to %d, not %d", core->queue_count - 1, queue_index);
    return -1;
}

/* A job with room for `count` segments and none yet. */
static Job *new_job(size_t count) {
    Job *job = malloc(sizeof *job + count * sizeof *job->segments);
    if (job)
        memset(job, 0, sizeof *job);
    else
        PyErr_NoMemory();
    return job;
}

/* Neighbours on both sides become one copy. */
static inline void add_segment(Job *job, uint64_t dst, uint64_t src, size_t size) {
    Segment *last = job->count ? &job->segments[job->count - 1] : NULL;
    if (last && last->dst + last->size == (char *)(uintptr_t)dst &&
        last->src + last->size == (const char *)(uintptr_t)src)
        last->size += size;
    else if (size)
        job->segments[job->count++] = (Segment){(char *)(uintptr_t)dst, (const char *)(uintptr_t)src, size};
}

/* Hands the job to the threads; its handle. Takes the job over, also when it fails. */
static PyObject *queue_job(Core *core, int queue_index, Job *job) {
    JobObject *handle = (JobObject *)((allocfunc)PyType_GetSlot(job_type, Py_tp_alloc))(job_type, 0);
    if (handle == NULL) {
        free(job);
        return NULL;
    }
    job->queue = queue_index;
    atomic_init(&job->state, JOB_OPEN);
    atomic_init(&job->refs, 2); /* the handle and the core */
    handle->job = job;
    handle->core = core;
    atomic_fetch_add(&core->refs, 1);
    size_t total = 0;
    for (size_t i = 0; i < job->count && total <= PIECE_BYTES; i++)
        total += job->segments[i].size;

    int queued = 0;
    pthread_mutex_lock(&core->lock);
    if (core->stop || job->count == 0) {
        job->cancelled = core->stop;
        end_job(core, job);
    } else {
        queued = 1;
        Queue *queue = &core->queues[queue_index];
        if (queue->tail)
            queue->tail->after = job;
        else
            queue->head = job;
        queue->tail = job;
    }
    pthread_mutex_unlock(&core->lock);
    /* Without the lock, so that nobody wakes up to wait for it. One piece is work for one thread. */
    if (queued && total > PIECE_BYTES)
        pthread_cond_broadcast(&core->work);
    else if (queued)
        pthread_cond_signal(&core->work);
    return (PyObject *)handle;
}

static PyObject *engine_submit(PyObject *self, PyObject *args) {
    Core *core = ((EngineObject *)self)->core;
    PyObject *dst_object, *src_object, *size_object, *result = NULL;
    int queue_index;
    if (!PyArg_ParseTuple(args, "iOOO", &queue_index, &dst_object, &src_object, &size_object))
        return NULL;
    if (check_generation(core) || check_queue(core, queue_index))
        return NULL;
    Py_buffer dst = {0}, src = {0}, sizes = {0};
    size_t uniform = 0;
    int has_sizes = !PyLong_Check(size_object);
    if (!has_sizes) {
        uniform = PyLong_AsSize_t(size_object);
        if (PyErr_Occurred())
            return NULL;
    }
    if (get_words(dst_object, &dst, "dst"))
        return NULL;
    if (get_words(src_object, &src, "src"))
        goto release_dst;
    if (has_sizes && get_words(size_object, &sizes, "size"))
        goto release_src;
    size_t count = (size_t)dst.len / 8;
    if (src.len != dst.len || (has_sizes && sizes.len != dst.len)) {
        PyErr_SetString(PyExc_ValueError, "dst, src and size must be of one length");
        goto release_all;
    }
    Job *job = new_job(count);
    if (job == NULL)
        goto release_all;
    const uint64_t *d = dst.buf, *s = src.buf, *z = sizes.buf;
    for (size_t i = 0; i < count; i++)
        add_segment(job, d[i], s[i], has_sizes ? (size_t)z[i] : uniform);
    result = queue_job(core, queue_index, job);

release_all:
    if (has_sizes)
        PyBuffer_Release(&sizes);
release_src:
    PyBuffer_Release(&src);
release_dst:
    PyBuffer_Release(&dst);
    return result;
}

/* Item i of a list of row numbers as an address; -1 in *failed, with an exception set, if it is not a row. */
static inline uint64_t row_address(PyObject *rows, Py_ssize_t i, unsigned long long base, unsigned long long stride,
                                   unsigned long long count, int *failed) {
    unsigned long long row = PyLong_AsUnsignedLongLong(PyList_GetItem(rows, i));
    if (row >= count) { /* also what a failed conversion returns */
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "row %llu is not below %llu", row, count);
        *failed = -1;
    }
    return base + row * stride;
}

static PyObject *engine_submit_rows(PyObject *self, PyObject *args) {
    Core *core = ((EngineObject *)self)->core;
    int queue_index, failed = 0;
    unsigned long long dst, dst_stride, dst_count, src, src_stride, src_count;
    PyObject *dst_rows, *src_rows;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "iKKKOKKKOn", &queue_index, &dst, &dst_stride, &dst_count, &dst_rows, &src, &src_stride,
                          &src_count, &src_rows, &size))
        return NULL;
    if (check_generation(core) || check_queue(core, queue_index))
        return NULL;
    if (!PyList_Check(dst_rows) || !PyList_Check(src_rows) || size < 0) {
        PyErr_SetString(PyExc_TypeError, "rows must be lists of integers, and the size not negative");
        return NULL;
    }
    Py_ssize_t count = PyList_Size(dst_rows);
    if (PyList_Size(src_rows) != count) {
        PyErr_SetString(PyExc_ValueError, "the two lists of rows must be of one length");
        return NULL;
    }
    Job *job = new_job((size_t)count);
    if (job == NULL)
        return NULL;
    for (Py_ssize_t i = 0; i < count && failed == 0; i++) {
        uint64_t to = row_address(dst_rows, i, dst, dst_stride, dst_count, &failed);
        uint64_t from = failed ? 0 : row_address(src_rows, i, src, src_stride, src_count, &failed);
        add_segment(job, to, from, (size_t)size);
    }
    if (failed) {
        free(job);
        return NULL;
    }
    return queue_job(core, queue_index, job);
}

/* Checks that memory to populate starts on a page; 0, or -1 with an exception set. */
static int check_start(unsigned long long address) {
    if (address != 0 && address % PAGE == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "memory to populate must start on a page, not at %llu", address);
    return -1;
}

static PyObject *engine_populate(PyObject *self, PyObject *args) {
    Core *core = ((EngineObject *)self)->core;
    int queue_index;
    unsigned long long address, size;
    if (!PyArg_ParseTuple(args, "iKK", &queue_index, &address, &size))
        return NULL;
    if (check_generation(core) || check_queue(core, queue_index) || check_start(address))
        return NULL;
    Job *job = new_job(1);
    if (job == NULL)
        return NULL;
    job->populates = 1;
    add_segment(job, address, 0, (size_t)size);
    return queue_job(core, queue_index, job);
}

/* Test-only: budget of a queue, in pieces. */
static PyObject *engine_limit(PyObject *self, PyObject *args) {
    Core *core = ((EngineObject *)self)->core;
    int queue_index;
    long pieces;
    if (!PyArg_ParseTuple(args, "il", &queue_index, &pieces) || check_generation(core) || check_queue(core, queue_index))
        return NULL;
    pthread_mutex_lock(&core->lock);
    core->queues[queue_index].budget = pieces;
    pthread_cond_broadcast(&core->work);
    pthread_mutex_unlock(&core->lock);
    Py_RETURN_NONE;
}

static PyObject *engine_signal(PyObject *self, PyObject *args) {
    Core *core = ((EngineObject *)self)->core;
    int fd;
    if (!PyArg_ParseTuple(args, "i", &fd) || check_generation(core))
        return NULL;
    pthread_mutex_lock(&core->lock);
    core->signal = fd;
    pthread_mutex_unlock(&core->lock);
    Py_RETURN_NONE;
}

static PyObject *engine_thread_ids(PyObject *self, void *unused) {
    Core *core = ((EngineObject *)self)->core;
    PyObject *ids = PyList_New(core->thread_count);
    for (int i = 0; ids && i < core->thread_count; i++) {
        PyObject *id = PyLong_FromLong(core->tids[i]);
        if (id == NULL || PyList_SetItem(ids, i, id))
            Py_CLEAR(ids);
    }
    return ids;
}

static PyObject *engine_kernel(PyObject *self, void *unused) {
    return PyUnicode_FromString(KERNELS[((EngineObject *)self)->core->kernel].name);
}

static PyGetSetDef engine_getset[] = {
    {"kernel", engine_kernel, NULL, "Name of the copy kernel in use.", NULL},
    {"thread_ids", engine_thread_ids, NULL, "The kernel's ids of the copy threads.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef engine_methods[] = {
    {"submit", engine_submit, METH_VARARGS,
     "submit(queue, dst, src, size) -> Job\n\n"
     "Queue copies of size[i] bytes (or size bytes each) from address src[i] to dst[i]. The arrays are copied; the\n"
     "memory behind the addresses must stay valid until the job is done. Takes time in the number of addresses only."},
    {"submit_rows", engine_submit_rows, METH_VARARGS,
     "submit_rows(queue, dst, dst_stride, dst_count, dst_rows, src, src_stride, src_count, src_rows, size) -> Job\n\n"
     "submit() for rows of size bytes: from row src_rows[i] to row dst_rows[i], lists of integers below the counts."},
    {"populate", engine_populate, METH_VARARGS,
     "populate(queue, address, size) -> Job\n\n"
     "Queue the population of size bytes from address on, the start of a page: a huge page at a time is backed with\n"
     "memory. What is there stays as it is. The mapping must stay valid until the job is done, which is not signalled."},
    {"limit", engine_limit, METH_VARARGS,
     "limit(queue, pieces)\n\nFor tests: let the threads take that many more pieces of the queue (0 holds it, -1 lifts the limit)."},
    {"signal", engine_signal, METH_VARARGS,
     "signal(fd)\n\nFrom now on write to this non-blocking eventfd when a job has ended; -1 for none. It stays the caller's: turn "
     "it off before closing it."},
    {"close", engine_close, METH_NOARGS,
     "End the threads. Pieces being copied are finished, jobs not copied to their end have failed. Idempotent."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot engine_slots[] = {
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_getset, engine_getset},
    {Py_tp_methods, engine_methods},
    {Py_tp_doc, "Engine(threads, queues, ordered=False, kernel=None)\n\nCopy threads and the queues they serve, lowest first."},
    {0, NULL},
};
static PyType_Spec engine_spec = {"async_tier._host_copy.Engine", sizeof(EngineObject), 0, Py_TPFLAGS_DEFAULT,
                                  engine_slots};

/* ---------------------------------------------------------------------------------------------------- the module */

static PyObject *module_kernels(PyObject *self, PyObject *unused) {
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < KERNEL_COUNT; i++) {
        if (!KERNELS[i].supported())
            continue;
        PyObject *name = PyUnicode_FromString(KERNELS[i].name);
        if (name == NULL || PyList_Append(names, name))
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *module_copy(PyObject *self, PyObject *args) {
    unsigned long long dst, src, size;
    const char *kernel = NULL;
    if (!PyArg_ParseTuple(args, "KKK|z", &dst, &src, &size, &kernel))
        return NULL;
    int index = find_kernel(kernel);
    if (index < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    KERNELS[index].copy((char *)(uintptr_t)dst, (const char *)(uintptr_t)src, (size_t)size);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *module_populate(PyObject *self, PyObject *args) {
    unsigned long long address, size;
    if (!PyArg_ParseTuple(args, "KK", &address, &size) || check_start(address))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    char *start = (char *)(uintptr_t)address;
    for (unsigned long long at = 0; at < size; at += PIECE_BYTES)
        populate_piece(start + at, size - at < PIECE_BYTES ? (size_t)(size - at) : PIECE_BYTES);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"kernels", module_kernels, METH_NOARGS, "Names of the copy kernels this processor supports."},
    {"copy", module_copy, METH_VARARGS,
     "copy(dst, src, size, kernel=None)\n\nCopy size bytes between addresses on the calling thread, without the GIL."},
    {"populate", module_populate, METH_VARARGS,
     "populate(address, size)\n\nEngine.populate on the calling thread, without the GIL."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "_host_copy", "Native copy threads; see streams/host.py.", -1, module_methods,
    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__host_copy(void) {
    static int registered;
    if (!registered) {
        if (pthread_atfork(NULL, NULL, in_forked_child))
            return PyErr_NoMemory();
        registered = 1;
    }
    PyObject *module = PyModule_Create(&module_def);
    PyObject *engine = module ? PyType_FromSpec(&engine_spec) : NULL;
    job_type = (PyTypeObject *)(engine ? PyType_FromSpec(&job_spec) : NULL);
    if (job_type == NULL || PyModule_AddObjectRef(module, "Engine", engine) ||
        PyModule_AddObjectRef(module, "Job", (PyObject *)job_type)) {
        Py_XDECREF(module);
        module = NULL;
    }
    Py_XDECREF(engine);
    return module;
}
