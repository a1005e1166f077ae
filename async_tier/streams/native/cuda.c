/* CUDA's executor: one thread that queues copies on streams of its own, and polls for their ends.
 *
 * In CUDA, a copy from host memory to host memory blocks its caller, pinned or not. So each leg here has one end on the
 * device:
 *
 *     pool "host"     primary  --in-->  staging slot (device)  --out-->  arena        and back, with other slots
 *     pool "cuda:N"   primary  ------------------------------------->  arena (device)  and back
 *
 * Each arrow is a stream of its own. An event joins the legs of a piece, so both directions of PCIe are busy at once.
 *
 * Ownership, before any code:
 *
 *   Direction  loads or stores. Belongs to the thread, except the ring of `flights` with `first` and `count`, which the
 *              core's lock guards: a caller that abandons the thread ends their jobs. Any thread may read `oldest_ns`.
 *   Flight     a piece on the streams, oldest first. It uses the slot with its index in the ring `flights`. So a slot
 *              is free as soon as its last piece was seen to end, and nothing ever waits for a slot.
 *   event      belongs to one flight until it was seen complete; then it returns to the pool. A job has ended when the
 *              event recorded after its last copy was seen complete.
 *
 * The driver is called and not the runtime, because a driver call that fails leaves no state behind. The runtime keeps
 * a "last error", for which the next kernel launch of other code would be blamed (vLLM #51080).
 *
 * Failures: if a call is refused, only that job fails. Part of it may be queued, perhaps without an event to query. So
 * its direction is `stalled` and starts nothing more until its streams were seen empty. If the context itself is lost
 * (the driver answers a query of a stream with an error that no context survives), nothing can be queried any more: the
 * core is `broken`, all its jobs have failed, and CUDA is not called again. If a query is refused because some thread
 * captures a graph, it is repeated.
 */
#include "cuda.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#ifndef CUDA_LIBRARY
#define CUDA_LIBRARY "libcuda.so.1"
#endif

/* CUresult */
enum { SUCCESS = 0, NOT_READY = 600 };
#define NON_BLOCKING 1 /* CU_STREAM_NON_BLOCKING: not ordered with the legacy default stream */
#define RELAXED 2      /* CU_STREAM_CAPTURE_MODE_RELAXED */
/* CU_MEMCPY_SRC_ACCESS_ORDER_STREAM. The order ANY would allow a source to be read before earlier copies have written
 * it (vLLM #39306). */
#define ORDER_STREAM 1
/* The version whose cuMemcpyBatchAsync has a `failIdx`; later drivers still provide it under this number. */
#define BATCH_VERSION 12080

/* Segments of a piece, at most. This bounds how long its claim holds the lock, and how long its calls take. */
#define PIECE_SEGMENTS 512
#define PIECE_SEGMENTS_ONE_BY_ONE 128
/* Copies on a direction's streams, at most. A launch queue takes some 1,000 calls, or 26,000 copies in batches (seen on
 * an H100). When it is full, calls that otherwise take microseconds block, and so do queries of that stream. */
#define MAX_ENTRIES 8192
#define MAX_ENTRIES_ONE_BY_ONE 512
/* The pause between queries of events while copies are under way: the first one, and the longest. A copy of 1 MiB takes
 * 20 us. The copies on the streams last several times as long as the longest pause. */
#define FIRST_PAUSE_NS 20000
#define LONGEST_PAUSE_NS 100000
/* Copies that take longer than this are polled less often. */
#define LONG_NS 10000000
#define PAUSE_OF_LONG_NS 1000000
/* For a first pause of half the time that the bytes on the streams take at 50 GB/s. */
#define PAUSE_BYTES_PER_NS 100
/* If queries of a stream fail this many times in a row (a tenth of a second or more), even with errors that a context
 * survives, then nothing will be known about its copies, and the context counts as lost. */
#define MAX_REFUSALS 1000
#define TEXT_BYTES 512

typedef struct {
    int (*cuCtxPushCurrent_v2)(void *);
    int (*cuThreadExchangeStreamCaptureMode)(int *);
    int (*cuStreamCreate)(void **, unsigned);
    int (*cuStreamDestroy_v2)(void *);
    int (*cuStreamQuery)(void *);
    int (*cuStreamWaitEvent)(void *, void *, unsigned);
    int (*cuEventCreate)(void **, unsigned);
    int (*cuEventDestroy_v2)(void *);
    int (*cuEventRecord)(void *, void *);
    int (*cuEventQuery)(void *);
    int (*cuEventElapsedTime)(float *, void *, void *);
    int (*cuMemcpyAsync)(uint64_t, uint64_t, size_t, void *);
    int (*cuGetErrorName)(int, const char **);
    int (*cuGetErrorString)(int, const char **);
    int (*cuGetProcAddress_v2)(const char *, void **, int, uint64_t, void *);
} Driver;

static const char *const FUNCTIONS[] = {
    "cuCtxPushCurrent_v2", "cuThreadExchangeStreamCaptureMode",
    "cuStreamCreate",      "cuStreamDestroy_v2",
    "cuStreamQuery",       "cuStreamWaitEvent",
    "cuEventCreate",       "cuEventDestroy_v2",
    "cuEventRecord",       "cuEventQuery",
    "cuEventElapsedTime",  "cuMemcpyAsync",
    "cuGetErrorName",      "cuGetErrorString",
    "cuGetProcAddress_v2",
};
_Static_assert(sizeof FUNCTIONS == sizeof(Driver), "a name each");

/* CUmemcpyAttributes; location hints are for managed memory. */
typedef struct {
    unsigned source_access_order;
    int source_location[2], destination_location[2];
    unsigned flags;
} BatchAttributes;
typedef int (*batch_fn)(uint64_t *, uint64_t *, size_t *, size_t, BatchAttributes *, size_t *, size_t, size_t *,
                        void *);

typedef struct {
    Piece piece;
    int entries;
    void *joined, *ended;      /* events: recorded between the legs, and at the end; NULL until then */
    int64_t begun_ns, open_ns; /* when it was begun, and when it was last seen not to have ended */
} Flight;

typedef struct {
    DirectionLimits limits;
    void *in, *out; /* streams; the same one where there is one leg */
    Flight flights[MAX_PIECES];
    int first, count;
    size_t bytes;
    int entries;
    int stalled;
    int refusals; /* failed queries of its streams in a row */
    void *known;  /* an event whose time, `known_ns`, is known */
    int64_t known_ns;
    _Atomic int64_t oldest_ns;
} Direction;

struct Cuda {
    Core core; /* first: they are freed as one */
    Driver driver;
    batch_fn batch;
    void *context;
    size_t piece_bytes;
    Direction directions[DIRECTIONS];
    pthread_t thread;
    /* Guarded by `core.lock`. */
    int has_begun, has_ended, is_abandoned;
    char *refusal; /* why it could not start or, once it has ended, why events or streams were not destroyed */
    /* Only for the thread. */
    struct {
        void *any, *free; /* two lists in one: of all events, and of those that are free */
    } *events;
    int all_events, free_events, event_room;
    uint64_t batch_dst[MAX_BATCH], batch_src[MAX_BATCH];
    size_t batch_size[MAX_BATCH];
    int batched;
};

/* Whether the error is one that no context survives, or means that the context or the stream no longer exists. */
static int is_lost(int code) {
    static const short LOST[] = {3,   4,   201, 214, 220, 226, 400, 700, 702, 709, 710,
                                 714, 715, 716, 717, 718, 719, 721, 810, 911, 999};
    for (size_t i = 0; i < sizeof LOST / sizeof *LOST; i++)
        if (code == LOST[i])
            return 1;
    return 0;
}

/* Whether a call was refused because some thread captures a graph. */
static int is_capture_refusal(int code) { return code >= 900 && code <= 907; }

/* "<before><call>: <text> (<name>, <code>)"; the caller frees it. */
static char *error_text(const Driver *driver, const char *before, const char *call, int code) {
    const char *name = NULL, *text = NULL;
    char *line = malloc(TEXT_BYTES);
    driver->cuGetErrorName(code, &name);
    driver->cuGetErrorString(code, &text);
    if (line)
        snprintf(line, TEXT_BYTES, "%s%s: %s (%s, %d)", before, call, text ? text : "unknown error",
                 name ? name : "unknown", code);
    return line;
}

/* ----------------------------------------------------------------------------------------------------------- copies */

/* For functions that return a code, with the name of the refused call in *call: call the driver, return if refused. */
#define TRY(name, ...)                                                                                                 \
    do {                                                                                                               \
        int code_ = (*call = #name, cuda->driver.name(__VA_ARGS__));                                                   \
        if (code_)                                                                                                     \
            return code_;                                                                                              \
    } while (0)

static int flush_batch(Cuda *cuda, void *stream, const char **call) {
    int count = cuda->batched, code = SUCCESS;
    cuda->batched = 0;
    if (cuda->batch && count > 1) {
        BatchAttributes attributes = {.source_access_order = ORDER_STREAM};
        size_t from = 0, failed_at = 0;
        *call = "cuMemcpyBatchAsync";
        return cuda->batch(cuda->batch_dst, cuda->batch_src, cuda->batch_size, (size_t)count, &attributes, &from, 1,
                           &failed_at, stream);
    }
    *call = "cuMemcpyAsync";
    for (int i = 0; i < count && code == SUCCESS; i++)
        code = cuda->driver.cuMemcpyAsync(cuda->batch_dst[i], cuda->batch_src[i], cuda->batch_size[i], stream);
    return code;
}

/* Bytes from an address to the next boundary of the grid. */
static size_t to_line(uint64_t address, const Grid *grid) {
    return grid->alignment ? grid->alignment - (address - grid->origin) % grid->alignment : SIZE_MAX;
}

/* Queue one copy, split where a registration begins: the driver refuses a copy that spans two ("invalid argument"). */
static int queue_copy(Cuda *cuda, const Job *job, Segment copy, int reads, int writes, Flight *flight, void *stream,
                      const char **call) {
    static const Grid NOWHERE;
    const Grid *src_grid = reads ? &job->src_grid : &NOWHERE, *dst_grid = writes ? &job->dst_grid : &NOWHERE;
    while (copy.size) {
        size_t size = copy.size, to_src = to_line((uintptr_t)copy.src, src_grid),
               to_dst = to_line((uintptr_t)copy.dst, dst_grid);
        size = to_src < size ? to_src : size;
        size = to_dst < size ? to_dst : size;
        cuda->batch_dst[cuda->batched] = (uintptr_t)copy.dst;
        cuda->batch_src[cuda->batched] = (uintptr_t)copy.src;
        cuda->batch_size[cuda->batched++] = size;
        flight->entries++;
        if (cuda->batched == MAX_BATCH) {
            int code = flush_batch(cuda, stream, call);
            if (code)
                return code;
        }
        copy = (Segment){copy.dst + size, copy.src + size, copy.size - size};
    }
    return SUCCESS;
}

/* Queue one leg of a flight. It reads the job's sources if `reads`, otherwise the slot. It writes the destinations if
 * `writes`, otherwise the slot. A slot has no gaps, so neighbours on the other side are merged here. */
static int queue_leg(Cuda *cuda, Flight *flight, int reads, int writes, char *slot, void *stream, const char **call) {
    const Job *job = flight->piece.job;
    size_t at = flight->piece.at, offset = flight->piece.offset, done = 0;
    Segment run = {0};
    int code = SUCCESS;
    while (done < flight->piece.bytes && code == SUCCESS) {
        const Segment *segment = &job->segments[at++];
        size_t size = segment->size - offset, left = flight->piece.bytes - done;
        size = size < left ? size : left;
        Segment next = {writes ? segment->dst + offset : slot + done, reads ? segment->src + offset : slot + done,
                        size};
        if (run.size && run.dst + run.size == next.dst && run.src + run.size == next.src) {
            run.size += size;
        } else {
            code = queue_copy(cuda, job, run, reads, writes, flight, stream, call);
            run = next;
        }
        done += size;
        offset = 0;
    }
    if (code == SUCCESS)
        code = queue_copy(cuda, job, run, reads, writes, flight, stream, call);
    if (code == SUCCESS)
        code = flush_batch(cuda, stream, call);
    cuda->batched = 0;
    return code;
}

/* ----------------------------------------------------------------------------------------------------------- events */

/* Records an event of the pool or a new one; *event is set even if recording is refused. */
static int record(Cuda *cuda, void **event, void *stream, const char **call) {
    if (cuda->free_events) {
        *event = cuda->events[--cuda->free_events].free;
    } else {
        if (cuda->all_events == cuda->event_room) { /* room for all to be free at once */
            int room = 2 * cuda->event_room + 64;
            void *events = realloc(cuda->events, (size_t)room * sizeof *cuda->events);
            *call = "cuEventCreate";
            if (events == NULL)
                return 2; /* CUDA_ERROR_OUT_OF_MEMORY */
            cuda->events = events;
            cuda->event_room = room;
        }
        TRY(cuEventCreate, event, 0);
        cuda->events[cuda->all_events++].any = *event;
    }
    TRY(cuEventRecord, *event, stream);
    return SUCCESS;
}

/* Returns an event to the pool. It was seen complete, or its streams were seen empty. */
static void recycle_event(Cuda *cuda, void *event) {
    if (event)
        cuda->events[cuda->free_events++].free = event;
}

/* ns from one event to another, both complete; 0 if the driver cannot tell. */
static int64_t elapsed(Cuda *cuda, void *from, void *to) {
    float ms = 0;
    if (from == NULL || to == NULL || cuda->driver.cuEventElapsedTime(&ms, from, to))
        return 0;
    return (int64_t)((double)ms * 1e6);
}

typedef struct {
    int64_t started_ns, ended_ns, in_ended_ns, out_started_ns;
} Times;

/* When the last copy of a job ended: the known time of an earlier event, plus the time between the two. Limited to the
 * interval in which the copy must have ended, because the clocks of device and host drift apart. */
static int64_t time_of(Cuda *cuda, Direction *direction, void *event, int64_t open_ns, int64_t seen_ns) {
    int64_t at = direction->known ? direction->known_ns + elapsed(cuda, direction->known, event) : seen_ns;
    return at < open_ns ? open_ns : at > seen_ns ? seen_ns : at;
}

enum { STARTED, FIRST_JOINED }; /* a job's marks */

/* When the copies of a job were made. Its last flight was seen to end. */
static Times times_of(Cuda *cuda, Direction *direction, Flight *flight, int64_t seen_ns) {
    const Job *job = flight->piece.job;
    void *started = job->marks[STARTED], *ended = flight->ended;
    void *first_joined = job->marks[FIRST_JOINED] ? job->marks[FIRST_JOINED] : flight->joined;
    Times times = {.ended_ns = time_of(cuda, direction, ended, flight->open_ns, seen_ns)};
    times.started_ns = times.ended_ns - elapsed(cuda, started, ended);
    if (flight->joined) {
        times.in_ended_ns = times.started_ns + elapsed(cuda, started, flight->joined);
        times.out_started_ns = times.started_ns + elapsed(cuda, started, first_joined);
    }
    recycle_event(cuda, direction->known);
    direction->known = ended;
    direction->known_ns = times.ended_ns;
    flight->ended = NULL;
    return times;
}

/* ---------------------------------------------------------------------------------------------------------- flights */

static int has_room(const Cuda *cuda, const Direction *direction) {
    if (direction->stalled || direction->count == 0)
        return !direction->stalled;
    return direction->count < direction->limits.pieces &&
           direction->bytes + cuda->piece_bytes <= direction->limits.limit &&
           direction->entries < (cuda->batch ? MAX_ENTRIES : MAX_ENTRIES_ONE_BY_ONE);
}

/* The only place where copies are queued. Even if it fails, part of the piece may be under way. */
static int queue_flight(Cuda *cuda, Direction *direction, Flight *flight, int slot_number, const char **call) {
    Job *job = flight->piece.job;
    int code = SUCCESS;
    if (flight->piece.is_first)
        code = record(cuda, &job->marks[STARTED], direction->in, call);
    if (code)
        return code;
    if (direction->limits.staging == 0) {
        code = queue_leg(cuda, flight, 1, 1, NULL, direction->in, call);
    } else {
        char *slot = (char *)(uintptr_t)direction->limits.staging + (size_t)slot_number * cuda->piece_bytes;
        code = queue_leg(cuda, flight, 1, 0, slot, direction->in, call);
        if (code == SUCCESS)
            code = record(cuda, &flight->joined, direction->in, call);
        if (code)
            return code;
        TRY(cuStreamWaitEvent, direction->out, flight->joined, 0);
        code = queue_leg(cuda, flight, 0, 1, slot, direction->out, call);
    }
    return code ? code : record(cuda, &flight->ended, direction->out, call);
}

/* lock held. Removes the oldest flight. */
static void pop_flight(Direction *direction) {
    direction->first = (direction->first + 1) % direction->limits.pieces;
    direction->count--;
    atomic_store(&direction->oldest_ns, direction->count ? direction->flights[direction->first].begun_ns : 0);
}

/* lock held. Fails the jobs of all flights, whose ends will not be queried. */
static void fail_flights(Cuda *cuda) {
    for (int i = 0; i < DIRECTIONS; i++)
        while (cuda->directions[i].count) {
            Job *job = cuda->directions[i].flights[cuda->directions[i].first].piece.job;
            job->failed = 1;
            if (cuda->is_abandoned) /* never freed, because the thread may still read it */
                atomic_fetch_add(&job->refs, 1);
            pop_flight(&cuda->directions[i]);
            core_settle(&cuda->core, job);
        }
}

/* The context is lost: all jobs fail, and CUDA is not called again. Takes over `why`. */
static void mark_lost(Cuda *cuda, char *why) {
    Core *core = &cuda->core;
    pthread_mutex_lock(&core->lock);
    core->broken = why ? why : strdup("CUDA has refused all calls");
    core_cancel(core);
    if (!cuda->is_abandoned)
        fail_flights(cuda);
    pthread_mutex_unlock(&core->lock);
}

/* Whether the streams of a direction are empty. A lost context is noticed here, because the driver then answers every
 * query with that error. After other errors the query is repeated, up to MAX_REFUSALS times. */
static int is_idle(Cuda *cuda, Direction *direction) {
    void *streams[] = {direction->in, direction->out};
    int idle = 1;
    for (int i = 0; i < 2 && !cuda->core.broken; i++) {
        int code = cuda->driver.cuStreamQuery(streams[i]);
        int is_answer = code == SUCCESS || code == NOT_READY || is_capture_refusal(code);
        direction->refusals = is_answer ? 0 : direction->refusals + 1;
        if (is_lost(code) || direction->refusals == MAX_REFUSALS)
            mark_lost(cuda, error_text(&cuda->driver, "", "cuStreamQuery", code));
        idle &= code == SUCCESS;
    }
    return idle;
}

/* A call was refused: fail the job, and stall the direction until its streams are empty. */
static void handle_refusal(Cuda *cuda, Direction *direction, Job *job, const char *doing, const char *call, int code) {
    Core *core = &cuda->core;
    char *reason = error_text(&cuda->driver, doing, call, code);
    direction->stalled = 1;
    pthread_mutex_lock(&core->lock);
    if (!cuda->is_abandoned)
        core_fail(core, job, reason);
    else
        free(reason);
    pthread_mutex_unlock(&core->lock);
    is_idle(cuda, direction);
}

/* The oldest flight; NULL if there is none, or if the thread was abandoned, which failed its job. The flight and its
 * job stay until the thread settles it. */
static Flight *oldest_flight(Cuda *cuda, Direction *direction) {
    pthread_mutex_lock(&cuda->core.lock);
    Flight *flight = direction->count ? &direction->flights[direction->first] : NULL;
    pthread_mutex_unlock(&cuda->core.lock);
    return flight;
}

/* The oldest flight has ended. */
static void settle(Cuda *cuda, Direction *direction, Flight *flight) {
    const int64_t seen_ns = now_ns();
    Core *core = &cuda->core;
    Job *job = flight->piece.job;
    Times times = {0};
    pthread_mutex_lock(&core->lock);
    int is_timed = flight->piece.is_last && !job->failed;
    pthread_mutex_unlock(&core->lock);
    if (is_timed)
        times = times_of(cuda, direction, flight, seen_ns);
    pthread_mutex_lock(&core->lock);
    if (!cuda->is_abandoned) {
        if (is_timed) {
            job->started_ns = times.started_ns, job->ended_ns = times.ended_ns;
            job->in_ended_ns = times.in_ended_ns, job->out_started_ns = times.out_started_ns;
        }
        int is_over = flight->piece.is_last || job->failed;
        recycle_event(cuda, flight->ended);
        if (flight->piece.is_first && !is_over)
            job->marks[FIRST_JOINED] = flight->joined;
        else
            recycle_event(cuda, flight->joined);
        for (int i = 0; i < 2 && is_over; i++) {
            recycle_event(cuda, job->marks[i]);
            job->marks[i] = NULL;
        }
        direction->bytes -= flight->piece.bytes;
        direction->entries -= flight->entries;
        pop_flight(direction);
        core_settle(core, job);
    }
    pthread_mutex_unlock(&core->lock);
}

/* Settle the flights of a direction that have ended. Never blocks. */
static void collect(Cuda *cuda, Direction *direction) {
    Flight *flight = oldest_flight(cuda, direction);
    if (flight && direction->stalled) {
        if (!is_idle(cuda, direction) || cuda->core.broken)
            return;
        direction->stalled = 0;
        for (; flight; flight = oldest_flight(cuda, direction))
            settle(cuda, direction, flight);
    }
    for (; flight; flight = oldest_flight(cuda, direction)) {
        const int64_t asked_ns = now_ns();
        int code = cuda->driver.cuEventQuery(flight->ended);
        if (code == SUCCESS) {
            settle(cuda, direction, flight);
            continue;
        }
        flight->open_ns = asked_ns;
        /* It is unknown whether its bytes have arrived. */
        if (code != NOT_READY && !is_capture_refusal(code))
            handle_refusal(cuda, direction, flight->piece.job,
                           "CUDA refused to ask for the end of a copy: ", "cuEventQuery", code);
        return;
    }
}

/* lock held. Start the next piece for which there is room, loads first. Whether there was one. */
static int start_next(Cuda *cuda) {
    Core *core = &cuda->core;
    for (int i = 0; i < DIRECTIONS; i++) {
        Direction *direction = &cuda->directions[i];
        if (!core_may_claim(&core->queues[i]))
            continue;
        if (!has_room(cuda, direction)) {
            if (direction->limits.staging && !direction->stalled) /* a store would share PCIe with loads that wait */
                break;
            continue;
        }
        int slot = (direction->first + direction->count++) % direction->limits.pieces;
        Flight *flight = &direction->flights[slot];
        *flight = (Flight){.begun_ns = now_ns()};
        flight->open_ns = flight->begun_ns;
        flight->piece =
            core_claim(&core->queues[i], cuda->piece_bytes, cuda->batch ? PIECE_SEGMENTS : PIECE_SEGMENTS_ONE_BY_ONE);
        direction->bytes += flight->piece.bytes;
        if (direction->count == 1)
            atomic_store(&direction->oldest_ns, flight->begun_ns);
        pthread_mutex_unlock(&core->lock);
        const char *call = "";
        int code = queue_flight(cuda, direction, flight, slot, &call);
        direction->entries += flight->entries;
        if (code)
            handle_refusal(cuda, direction, flight->piece.job, "CUDA refused to queue a copy: ", call, code);
        pthread_mutex_lock(&core->lock);
        return 1;
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------------- the thread */

/* Make the context current, keep out of other threads' captures, and create the streams. */
static int set_up(Cuda *cuda, const char **call) {
    int mode = RELAXED;
    TRY(cuCtxPushCurrent_v2, cuda->context);
    TRY(cuThreadExchangeStreamCaptureMode, &mode);
    for (int i = 0; i < DIRECTIONS; i++) {
        Direction *direction = &cuda->directions[i];
        TRY(cuStreamCreate, &direction->in, NON_BLOCKING);
        if (direction->limits.staging)
            TRY(cuStreamCreate, &direction->out, NON_BLOCKING);
        else
            direction->out = direction->in;
    }
    return SUCCESS;
}

/* Destroy all events and streams. Returns the first refusal, or NULL. Not all events are in the pool: a job that was
 * cancelled between two of its pieces has some. */
static char *tear_down(Cuda *cuda) {
    char *refusal = NULL;
    for (int i = 0; i < cuda->all_events; i++) {
        int code = cuda->driver.cuEventDestroy_v2(cuda->events[i].any);
        if (code && !refusal)
            refusal = error_text(&cuda->driver, "", "cuEventDestroy", code);
    }
    for (int i = 0; i < DIRECTIONS; i++) {
        void *streams[] = {cuda->directions[i].in, cuda->directions[i].out};
        for (int leg = 0; leg < (streams[0] == streams[1] ? 1 : 2); leg++) {
            int code = streams[leg] ? cuda->driver.cuStreamDestroy_v2(streams[leg]) : SUCCESS;
            if (code && !refusal)
                refusal = error_text(&cuda->driver, "", "cuStreamDestroy", code);
        }
    }
    return refusal;
}

/* lock held. Start pieces and settle flights until the end; sleep while there is nothing to do. */
static void serve(Cuda *cuda) {
    Core *core = &cuda->core;
    int64_t pause = FIRST_PAUSE_NS;
    while (!core->broken && !cuda->is_abandoned) {
        if (start_next(cuda)) {
            pause = (int64_t)(cuda->directions[0].bytes + cuda->directions[1].bytes) / PAUSE_BYTES_PER_NS;
            pause = pause < FIRST_PAUSE_NS ? FIRST_PAUSE_NS : pause;
        } else if (cuda->directions[0].count + cuda->directions[1].count) {
            int64_t now = now_ns(),
                    longest = now - cuda_oldest_ns(cuda) < LONG_NS ? LONGEST_PAUSE_NS : PAUSE_OF_LONG_NS;
            pause = pause < longest ? pause : longest;
            struct timespec until = timespec_of(now + pause);
            pthread_cond_timedwait(&core->work, &core->lock, &until);
            pthread_mutex_unlock(&core->lock);
            for (int i = 0; i < DIRECTIONS && !core->broken; i++)
                collect(cuda, &cuda->directions[i]);
            pthread_mutex_lock(&core->lock);
            pause = pause * 3 / 2;
        } else if (core->stop) {
            return;
        } else {
            pthread_cond_wait(&core->work, &core->lock);
        }
    }
}

static void *run(void *argument) {
    Cuda *cuda = argument;
    Core *core = &cuda->core;
    const char *call = "";
    /* Not SCHED_BATCH like copy threads: with that it began a job after 0.8 ms instead of 20 us, on two cores of which
     * one was idle. Its work for a submit takes some 10 us per piece. */
    pthread_setname_np(pthread_self(), "async-tier-cuda");
    prctl(PR_SET_TIMERSLACK, 1000UL); /* 1 us; by default pauses would be 50 us longer than requested */
    int code = set_up(cuda, &call);
    char *refusal = code ? error_text(&cuda->driver, "", call, code) : NULL;
    pthread_mutex_lock(&core->lock);
    if (code == SUCCESS) {
        cuda->has_begun = 1;
        pthread_cond_broadcast(&core->ended);
        serve(cuda);
    }
    int is_lost_or_abandoned = core->broken || cuda->is_abandoned;
    pthread_mutex_unlock(&core->lock);
    char *end_refusal = is_lost_or_abandoned ? NULL : tear_down(cuda);
    pthread_mutex_lock(&core->lock);
    cuda->refusal = refusal ? refusal : end_refusal;
    cuda->has_ended = 1;
    pthread_cond_broadcast(&core->ended);
    pthread_mutex_unlock(&core->lock);
    core_unref(core);
    return NULL;
}

/* ----------------------------------------------------------------------------------------------------- from outside */

static void cuda_free(Core *core) {
    Cuda *cuda = (Cuda *)core;
    free(cuda->events);
    free(cuda->refusal);
    free(cuda);
}

/* Load the driver's functions, and its call for batches if wanted. 0, or -1 and the reason in *error. */
static int load_driver(Cuda *cuda, int may_batch, char **error) {
    void *library = dlopen(CUDA_LIBRARY, RTLD_NOW), **functions = (void **)&cuda->driver;
    for (size_t i = 0; library && i < sizeof FUNCTIONS / sizeof *FUNCTIONS; i++)
        if ((functions[i] = dlsym(library, FUNCTIONS[i])) == NULL)
            library = NULL;
    if (library == NULL) {
        const char *why = dlerror();
        *error = strdup(why ? why : "libcuda.so.1 cannot be loaded");
        return -1;
    }
    void *batch = NULL;
    if (may_batch && cuda->driver.cuGetProcAddress_v2("cuMemcpyBatchAsync", &batch, BATCH_VERSION, 0, NULL) == SUCCESS)
        cuda->batch = (batch_fn)batch;
    return 0;
}

Cuda *cuda_open(void *context, int may_batch, size_t piece_bytes, const DirectionLimits limits[DIRECTIONS],
                char **error) {
    Cuda *cuda = calloc(1, sizeof *cuda);
    *error = NULL;
    if (cuda == NULL)
        return NULL;
    cuda->context = context;
    cuda->piece_bytes = piece_bytes;
    core_init(&cuda->core, DIRECTIONS, 0, SIZE_MAX, cuda_free);
    for (int i = 0; i < DIRECTIONS; i++)
        cuda->directions[i].limits = limits[i];
    int is_loaded = load_driver(cuda, may_batch, error) == 0, is_begun = 0;
    int code = is_loaded ? core_start(&cuda->core, &cuda->thread, run) : 0;
    if (code)
        *error = strdup(strerror(code));
    if (is_loaded && code == 0) {
        pthread_detach(cuda->thread); /* not joined, because it may hang in a call of the driver */
        pthread_mutex_lock(&cuda->core.lock);
        while (!cuda->has_begun && !cuda->has_ended)
            pthread_cond_wait(&cuda->core.ended, &cuda->core.lock);
        is_begun = cuda->has_begun;
        if (!is_begun && cuda->refusal)
            *error = strdup(cuda->refusal);
        pthread_mutex_unlock(&cuda->core.lock);
    }
    if (is_begun)
        return cuda;
    core_unref(&cuda->core);
    return NULL;
}

Core *cuda_core(Cuda *cuda) { return &cuda->core; }

int cuda_has_batch(const Cuda *cuda) { return cuda->batch != NULL; }

int cuda_streams(const Cuda *cuda, int direction, void *handles[2]) {
    handles[0] = cuda->directions[direction].in;
    handles[1] = cuda->directions[direction].out;
    return handles[0] == handles[1] ? 1 : 2;
}

int64_t cuda_oldest_ns(Cuda *cuda) {
    int64_t loads = atomic_load(&cuda->directions[0].oldest_ns), stores = atomic_load(&cuda->directions[1].oldest_ns);
    return loads == 0 || (stores && stores < loads) ? stores : loads;
}

const char *cuda_refusal(const Cuda *cuda) { return cuda->refusal; }

void cuda_stop(Cuda *cuda) {
    pthread_mutex_lock(&cuda->core.lock);
    cuda->core.stop = 1;
    core_cancel(&cuda->core);
    pthread_cond_broadcast(&cuda->core.work);
    pthread_mutex_unlock(&cuda->core.lock);
}

int cuda_wait_end(Cuda *cuda) {
    struct timespec until = timespec_of(now_ns() + NS_PER_S / 10);
    pthread_mutex_lock(&cuda->core.lock);
    if (!cuda->has_ended)
        pthread_cond_timedwait(&cuda->core.ended, &cuda->core.lock, &until);
    int has_ended = cuda->has_ended;
    pthread_mutex_unlock(&cuda->core.lock);
    return has_ended;
}

int cuda_is_quiet(Cuda *cuda) {
    pthread_mutex_lock(&cuda->core.lock);
    int is_quiet = cuda->has_ended && !cuda->is_abandoned && !cuda->core.broken;
    pthread_mutex_unlock(&cuda->core.lock);
    return is_quiet;
}

void cuda_abandon(Cuda *cuda) {
    pthread_mutex_lock(&cuda->core.lock);
    if (!cuda->has_ended) {
        cuda->is_abandoned = 1;
        fail_flights(cuda);
        pthread_cond_broadcast(&cuda->core.work);
    }
    pthread_mutex_unlock(&cuda->core.lock);
}
