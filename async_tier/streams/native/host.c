/* The host's executor: threads that copy, and that populate new memory. */
#include "host.h"

#include <errno.h>
#include <linux/mempolicy.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAVE_X86 1
#endif

/* Since Linux 5.14 (include/uapi/asm-generic/mman-common.h); older C libraries do not name it. */
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
/* Kernels are measured with buffers larger than the shared caches, as a tier is. Within the caches, kernels may look
 * alike that differ by a fifth in memory (seen on an AMD EPYC with 8 MiB). Measuring takes a quarter of a second. */
#define CALIBRATION_BYTES ((size_t)64 << 20)
/* Segments of a piece, at most: with very small copies, its claim holds the lock for some microseconds. */
#define PIECE_SEGMENTS 1024
/* Below this size a cached copy is as fast, and leaves little in the cache. */
#define STREAM_MIN_BYTES 4096
#define LINE 64
#define PAGE 4096

/* ------------------------------------------------------------------------------------------------ copy kernels
 *
 * Streaming stores bypass the caches, which the model needs, and do not read the destination first as ordinary stores
 * do. The best number of pages to copy side by side depends on the processor. On some, several pages keep several
 * prefetchers busy, and page after page runs at three quarters of the rate. On AMD's Zen 3, eight pages overrun the
 * write-combining buffers and run at a sixth. So the kernels are measured once per process, and the best one is used.
 */

typedef void (*copy_fn)(char *dst, const char *src, size_t n);

static void copy_portable(char *dst, const char *src, size_t n) { memcpy(dst, src, n); }

#ifdef HAVE_X86
/* In bytes, ahead of the line being read. A prefetch past the end of the memory does nothing. */
#define PREFETCH_AHEAD 512

#define LINE_AVX2(d, s)                                                                                                \
    do {                                                                                                               \
        __m256i low = _mm256_loadu_si256((const __m256i *)(s));                                                        \
        __m256i high = _mm256_loadu_si256((const __m256i *)(s) + 1);                                                   \
        _mm256_stream_si256((__m256i *)(d), low);                                                                      \
        _mm256_stream_si256((__m256i *)(d) + 1, high);                                                                 \
    } while (0)

#define LINE_AVX512(d, s) _mm512_stream_si512((__m512i *)(d), _mm512_loadu_si512((const void *)(s)))

/* A kernel that copies `pages` pages side by side, a 64-byte line of each in turn, and the rest line by line. */
#define STREAMING_KERNEL(name, instructions, pages, copy_line)                                                         \
    __attribute__((target(instructions))) static void name(char *dst, const char *src, size_t n) {                     \
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

/* The portable kernel is last, and is used only if no other is supported. */
static const struct {
    const char *name;
    copy_fn copy;
    int (*supported)(void);
} KERNELS[] = {
#ifdef HAVE_X86
    {"avx512x8", copy_avx512_x8, has_avx512}, {"avx512x4", copy_avx512_x4, has_avx512},
    {"avx512x1", copy_avx512_x1, has_avx512}, {"avx2x8", copy_avx2_x8, has_avx2},
    {"avx2x4", copy_avx2_x4, has_avx2},       {"avx2x1", copy_avx2_x1, has_avx2},
#endif
    {"portable", copy_portable, always},
};
#define KERNEL_COUNT ((int)(sizeof KERNELS / sizeof KERNELS[0]))

static pthread_mutex_t calibration = PTHREAD_MUTEX_INITIALIZER;

void kernel_after_fork(void) { pthread_mutex_init(&calibration, NULL); /* a thread of the parent may have held it */ }

int kernel_best(void) {
    static int best = -1;
    pthread_mutex_lock(&calibration);
    if (best < 0) {
        int64_t best_ns = INT64_MAX;
        char *memory = malloc(2 * CALIBRATION_BYTES);
        best = KERNEL_COUNT - 1;
        if (memory)
            memset(memory, 1, 2 * CALIBRATION_BYTES);
        for (int turn = 0; memory && turn < 3; turn++) /* the best of three, because other processes disturb */
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

const char *kernel_name(int kernel) {
    return kernel < KERNEL_COUNT && KERNELS[kernel].supported() ? KERNELS[kernel].name : NULL;
}

int kernel_find(const char *name) {
    for (int i = 0; i < KERNEL_COUNT; i++)
        if (KERNELS[i].supported() && strcmp(name, KERNELS[i].name) == 0)
            return i;
    return -1;
}

void kernel_copy(int kernel, char *dst, const char *src, size_t size) { KERNELS[kernel].copy(dst, src, size); }

/* ------------------------------------------------------------------------------------------------------- population */

/* Backs a range with memory, so that no copy pays for its page faults. If the system refuses, page faults do it later.
 *
 * The call holds the lock of the process's memory map, for which every thread waits that maps or unmaps memory, be it
 * in malloc. So at most PIECE_BYTES per call, a huge page. (32 MiB at once held a scheduler up for 15 to 45 ms.) */
static void populate_piece(char *start, size_t size) { (void)madvise(start, size, MADV_POPULATE_WRITE); }

void populate(char *start, size_t size) {
    for (size_t at = 0; at < size; at += PIECE_BYTES)
        populate_piece(start + at, size - at < PIECE_BYTES ? size - at : PIECE_BYTES);
}

int prefer_node(char *start, size_t size, unsigned node) {
    unsigned long nodes[16] = {0};
    const unsigned bits = 8 * sizeof *nodes;
    int policy;
    if (syscall(SYS_get_mempolicy, &policy, NULL, 0, NULL, 0))
        return errno;
    if (policy != MPOL_DEFAULT)
        return 0;
    if (node >= 8 * sizeof nodes)
        return EINVAL;
    nodes[node / bits] = 1UL << node % bits;
    return syscall(SYS_mbind, start, size, MPOL_PREFERRED, nodes, 8 * sizeof nodes, 0) ? errno : 0;
}

/* ------------------------------------------------------------------------------------------------------ the threads */

static void *worker(void *argument) {
    Host *host = argument;
    Core *core = &host->core;
    const copy_fn copy = KERNELS[host->kernel].copy;
    pthread_setname_np(pthread_self(), "async-tier-copy");
    /* In this class it does not preempt the thread that wakes it: the scheduler's, in a submit. (On two idle cores a
     * submit took 200 us instead of 50, because a piece was copied first.) A sandbox may refuse, which does no harm. */
    sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){0});
    pthread_mutex_lock(&core->lock);
    host->tids[host->ready++] = syscall(SYS_gettid);
    pthread_cond_broadcast(&core->ended);
    while (!core->stop) {
        Queue *queue = NULL;
        for (int i = 0; i < core->queue_count && queue == NULL; i++)
            if (core_may_claim(&core->queues[i]))
                queue = &core->queues[i];
        if (queue == NULL) {
            pthread_cond_wait(&core->work, &core->lock);
            continue;
        }
        Piece piece = core_claim(queue, PIECE_BYTES, PIECE_SEGMENTS);
        pthread_mutex_unlock(&core->lock);

        for (size_t todo = piece.bytes; todo > 0; piece.at++, piece.offset = 0) {
            const Segment *segment = &piece.job->segments[piece.at];
            size_t size = segment->size - piece.offset < todo ? segment->size - piece.offset : todo;
            if (piece.job->populates)
                populate_piece(segment->dst + piece.offset, size);
            else
                copy(segment->dst + piece.offset, segment->src + piece.offset, size);
            todo -= size;
        }

        pthread_mutex_lock(&core->lock);
        core_settle(core, piece.job);
    }
    pthread_mutex_unlock(&core->lock);
    core_unref(core);
    return NULL;
}

static void host_free(Core *core) { free(core); }

Host *host_open(int threads, int queues, int ordered, int kernel, int *error) {
    Host *host = calloc(1, sizeof *host);
    *error = ENOMEM;
    if (host == NULL)
        return NULL;
    host->kernel = kernel;
    core_init(&host->core, queues, ordered, PIECE_BYTES, host_free);
    for (*error = 0; host->thread_count < threads && *error == 0; host->thread_count += *error == 0)
        *error = core_start(&host->core, &host->threads[host->thread_count], worker);
    pthread_mutex_lock(&host->core.lock);
    while (host->ready < host->thread_count)
        pthread_cond_wait(&host->core.ended, &host->core.lock);
    pthread_mutex_unlock(&host->core.lock);
    if (*error == 0)
        return host;
    host_close(host);
    core_unref(&host->core);
    return NULL;
}

void host_close(Host *host) {
    pthread_mutex_lock(&host->core.lock);
    int is_first = !host->core.stop;
    host->core.stop = 1;
    core_cancel(&host->core);
    pthread_cond_broadcast(&host->core.work);
    pthread_mutex_unlock(&host->core.lock);
    for (int i = 0; is_first && i < host->thread_count; i++)
        pthread_join(host->threads[i], NULL);
}
