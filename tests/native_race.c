/* The core and both executors, used by many threads at once on the emulated CUDA, for ThreadSanitizer, AddressSanitizer and
 * UBSan (`make sanitize`). There is no Python in it: what module.c does with the core is done by hand here.
 *
 * Ownership, before any code:
 *
 *   Handle  a reference to a job and one to its core, as Python's Job has them. Of one thread.
 *   Bench   one engine and the threads that use it. Each of them has a reference to the core, and the main thread gives
 *           its own back first, so whoever is last frees the engine. Below `lock`: `shown`.
 *   Side    rows of memory, of one submitter. A job's rows are the executor's until the job has ended.
 *
 * Nothing sleeps to wait for something, and every wait has an end. Those that cannot be given one, such as a join, are
 * ended by an alarm.
 */
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cuda.h> /* NVIDIA's */

#include "../async_tier/streams/native/cuda.h"
#include "../async_tier/streams/native/host.h"

void cudaemu_set_jitter(double us, uint64_t seed);
void cudaemu_set_poison(int on);
void cudaemu_inject(const char *point, long nth, int code, int asynchronous);
int cudaemu_hold(uintptr_t stream);
int cudaemu_release(uintptr_t stream);
int64_t cudaemu_pending(uintptr_t stream);
uint64_t cudaemu_count(const char *api);
uint64_t cudaemu_violations(void);
int cudaemu_reset(void);

#define PATIENCE_NS (30 * NS_PER_S)
#define ALARM_S 180
#define JITTER_US 20
#define SUBMITTERS 4
#define READERS 2
#define MEMBERS (SUBMITTERS + READERS + 2)
#define QUEUES 2
#define HOST_JOBS 100
#define CUDA_JOBS 400
#define SHOWN 8 /* jobs that readers may take */
#define ABANDONED 100
#define ROWS 48
#define HOST_ROW_BYTES 50000 /* all rows: more than a copy thread takes at a time */
#define CUDA_ROW_BYTES 5000
#define UNALIGNED 24
#define STEP ((size_t)3 * PAGE) /* memory is registered in ranges of this size */
#define SLOT_BYTES ((size_t)32 << 10)
#define SLOTS 4
#define PAGE 4096
#define POPULATED_BYTES (2 * PIECE_BYTES + 3 * PAGE)

static void require(int holds, const char *what) {
    if (holds)
        return;
    fprintf(stderr, "native_race: %s\n", what);
    exit(1);
}

#define CHECK(call) require((call) == CUDA_SUCCESS, #call)

/* Asks until it is so. */
#define AWAIT(condition, what)                                                                                         \
    for (int64_t until_ = now_ns() + PATIENCE_NS; !(condition); sched_yield())                                         \
    require(now_ns() < until_, what)

/* Of a Core or a Bench. */
#define LOCKED(owner, ...) (pthread_mutex_lock(&(owner)->lock), __VA_ARGS__, pthread_mutex_unlock(&(owner)->lock))

static void on_alarm(int number) {
    static const char TEXT[] = "native_race: a thread does not end\n";
    (void)number;
    (void)!write(STDERR_FILENO, TEXT, sizeof TEXT - 1);
    _exit(1);
}

/* ---------------------------------------------------------------------------------------------------------- memory */

enum { PAGEABLE, PINNED, DEVICE };

typedef struct {
    int kind;
    char *memory; /* starts on a page; rows do not */
    size_t row_bytes, size, step;
    int order[ROWS];
} Side;

static char noise[HOST_ROW_BYTES + 256];

static Side new_side(int kind, size_t row_bytes) {
    Side side = {.kind = kind, .row_bytes = row_bytes, .size = (UNALIGNED + ROWS * row_bytes + STEP - 1) / STEP * STEP};
    for (int i = 0; i < ROWS; i++)
        side.order[i] = i;
    if (kind == DEVICE) {
        CHECK(cuMemAlloc((CUdeviceptr *)&side.memory, side.size));
        return side;
    }
    side.memory = aligned_alloc(PAGE, side.size);
    require(side.memory != NULL, "no memory");
    side.step = kind == PINNED ? STEP : 0;
    /* In ranges: a copy that spans two of them is refused, so one that was not cut is seen. */
    for (size_t at = 0; kind == PINNED && at < side.size; at += STEP)
        CHECK(cuMemHostRegister(side.memory + at, STEP, 0));
    return side;
}

static void free_side(Side *side) {
    for (size_t at = 0; side->kind == PINNED && at < side->size; at += STEP)
        CHECK(cuMemHostUnregister(side->memory + at));
    if (side->kind == DEVICE)
        CHECK(cuMemFree((CUdeviceptr)side->memory));
    else
        free(side->memory);
}

static char *row_of(const Side *side, int i) {
    return side->memory + UNALIGNED + (size_t)side->order[i] * side->row_bytes;
}

/* Now and then the natural order, in which rows are neighbours and become one copy. */
static void shuffle(Side *side, unsigned *seed) {
    int is_natural = rand_r(seed) % 3 == 0;
    for (int i = 0; i < ROWS; i++) {
        int other = is_natural ? i : rand_r(seed) % (i + 1);
        side->order[i] = side->order[other];
        side->order[other] = i;
    }
}

static void compare(const Side *dst, const Side *src, int count) {
    for (int i = 0; i < count && dst->kind != DEVICE && src->kind != DEVICE; i++)
        require(memcmp(row_of(dst, i), row_of(src, i), dst->row_bytes) == 0, "other bytes have arrived than were sent");
}

/* ------------------------------------------------------------------------------------------------------------ jobs */

typedef struct {
    Core *core;
    Job *job;
} Handle;

static Handle another(Handle handle) {
    if (handle.job) {
        atomic_fetch_add(&handle.job->refs, 1);
        atomic_fetch_add(&handle.core->refs, 1);
    }
    return handle;
}

static void drop(Handle handle) {
    if (handle.job) {
        job_unref(handle.job);
        core_unref(handle.core);
    }
}

static Handle submit(Core *core, int queue, Job *job) {
    atomic_fetch_add(&core->refs, 1);
    core_submit(core, queue, job);
    return (Handle){core, job};
}

static Handle submit_rows(Core *core, int queue, const Side *dst, const Side *src, int from, int count) {
    Job *job = job_new((size_t)count);
    require(job != NULL, "no memory");
    for (int i = from; i < from + count; i++)
        job_add(job, (uintptr_t)row_of(dst, i), (uintptr_t)row_of(src, i), dst->row_bytes);
    job->dst_grid = (Grid){(uintptr_t)dst->memory, dst->step};
    job->src_grid = (Grid){(uintptr_t)src->memory, src->step};
    return submit(core, queue, job);
}

/* Its state, and what anybody may read of a job that has ended. */
static int look(Handle handle) {
    const Job *job = handle.job;
    int state = atomic_load_explicit(&job->state, memory_order_acquire);
    if (state == JOB_OPEN)
        return state;
    require(job->started_ns <= job->ended_ns, "a job has ended before it started");
    if (state == JOB_DONE && job->in_ended_ns)
        require(job->started_ns <= job->out_started_ns && job->out_started_ns <= job->ended_ns &&
                    job->started_ns <= job->in_ended_ns && job->in_ended_ns <= job->ended_ns,
                "a leg outside its job's times");
    require(job->reason == NULL || (state == JOB_FAILED && job->reason[0]),
            "a reason of a job that is done, or none in it");
    return state;
}

/* How it has ended. Waits for the state alone, with no lock that would order what is read after it, or by core_wait. */
static int wait_for(Handle handle, unsigned *seed) {
    int asks = rand_r(seed) % 2;
    AWAIT((asks || (core_wait(handle.core, handle.job), 1)) && look(handle) != JOB_OPEN, "a job does not end");
    return look(handle);
}

/* What lies there stays as it is. */
static void populate_new(Core *core, unsigned *seed) {
    char *memory = mmap(NULL, POPULATED_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    Job *job = job_new(1);
    require(memory != MAP_FAILED && job != NULL, "no memory");
    memory[PIECE_BYTES] = 1;
    job->populates = 1;
    job_add(job, (uintptr_t)memory, 0, POPULATED_BYTES);
    Handle handle = submit(core, rand_r(seed) % QUEUES, job);
    require(wait_for(handle, seed) == JOB_DONE || core->stop, "memory was not populated");
    require(memory[PIECE_BYTES] == 1 && memory[0] == 0, "populated memory has changed");
    drop(handle);
    munmap(memory, POPULATED_BYTES);
}

static void set_budget(Core *core, int queue, long pieces) {
    LOCKED(core, core->queues[queue].budget = pieces, pthread_cond_broadcast(&core->work));
}

static long budget_of(Core *core, int queue) {
    long pieces;
    LOCKED(core, pieces = core->queues[queue].budget);
    return pieces;
}

static void set_signal(Core *core, int fd) { LOCKED(core, core->signal = fd); }

static uint64_t take(int fd) {
    uint64_t number = 0;
    return read(fd, &number, sizeof number) == sizeof number ? number : 0;
}

/* ---------------------------------------------------------------------------------------------------- many threads */

typedef struct {
    Core *core;
    Cuda *cuda; /* NULL: on the host */
    atomic_int quit;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    Handle shown[SHOWN];
    atomic_long over, refused; /* jobs that have ended, and of them those that CUDA has refused; grow below `lock` */
} Bench;

enum { HOME, ARENA, BACK };

typedef struct Member {
    Bench *bench;
    void (*act)(struct Member *);
    unsigned seed;
    pthread_t thread;
    Side sides[3]; /* a submitter's */
} Member;

/* Until so many jobs have ended, or been refused, or the bench is over. */
static void await_jobs(Bench *bench, const atomic_long *number, long at_least) {
    struct timespec until = timespec_of(now_ns() + PATIENCE_NS);
    pthread_mutex_lock(&bench->lock);
    while (*number < at_least && !bench->quit)
        require(!pthread_cond_timedwait(&bench->changed, &bench->lock, &until),
                "too few jobs have ended, or been refused");
    pthread_mutex_unlock(&bench->lock);
}

/* A job of some rows, to its end; whether their bytes have arrived. */
static int copy(Member *member, int queue, const Side *dst, const Side *src, int count) {
    Bench *bench = member->bench;
    Core *core = bench->core;
    Handle handle = submit_rows(core, queue, dst, src, 0, count), *place = &bench->shown[rand_r(&member->seed) % SHOWN];
    Handle before;
    LOCKED(bench, before = *place, *place = another(handle));
    drop(before);

    int is_done = wait_for(handle, &member->seed) == JOB_DONE;
    int is_refused = !is_done && handle.job->reason && strstr(handle.job->reason, "(CUDA_ERROR_UNKNOWN, 999)") != NULL;
    require(is_done || is_refused || core->stop || core->broken, "a job has failed that nobody has refused");
    if (is_done)
        compare(dst, src, count);
    drop(handle);
    LOCKED(bench, atomic_fetch_add(&bench->over, 1), atomic_fetch_add(&bench->refused, is_refused),
           pthread_cond_broadcast(&bench->changed));
    return is_done;
}

/* Store rows, and load them back into others. */
static void exchange(Member *member) {
    Core *core = member->bench->core;
    Side *home = &member->sides[HOME], *arena = &member->sides[ARENA], *back = &member->sides[BACK];
    if (core->stop || core->broken) { /* asked without the lock, as in module.c */
        sched_yield();
        return;
    }
    int count = rand_r(&member->seed) % (ROWS + 1);
    for (int side = 0; side < 3; side++)
        shuffle(&member->sides[side], &member->seed);
    for (int i = 0; i < count; i++)
        memcpy(row_of(home, i), noise + rand_r(&member->seed) % 256, home->row_bytes);
    if (copy(member, 1, arena, home, count) && copy(member, 0, back, arena, count))
        compare(back, home, count);
    if (member->bench->cuda == NULL && count % 4 == 0)
        populate_new(core, &member->seed);
}

static void read_one(Member *member) {
    Bench *bench = member->bench;
    Handle handle, *place = &bench->shown[rand_r(&member->seed) % SHOWN];
    LOCKED(bench, handle = another(*place));
    if (handle.job)
        wait_for(handle, &member->seed);
    drop(handle);
}

/* Holds a queue, lets some pieces go, one by one, and lifts the limit. */
static void hold(Member *member) {
    Core *core = member->bench->core;
    int queue = rand_r(&member->seed) % QUEUES;
    for (int step = 0; step < 3; step++) {
        set_budget(core, queue, 0);
        require(budget_of(core, queue) == 0, "a queue that is held has another limit");
        set_budget(core, queue, 1);
        for (int asked = 0; asked < 100 && budget_of(core, queue); asked++) {
            require(budget_of(core, queue) >= 0, "more pieces were taken than the queue was let");
            sched_yield();
        }
    }
    set_budget(core, queue, -1);
}

/* Jobs that end are heard of while the signal is on, and not once it is off. */
static void listen(Member *member) {
    Bench *bench = member->bench;
    struct pollfd signal = {.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), .events = POLLIN};
    set_signal(bench->core, signal.fd);
    AWAIT(poll(&signal, 1, 100) == 1 || bench->quit, "no job that has ended was heard of");
    set_signal(bench->core, -1);
    take(signal.fd);
    await_jobs(bench, &bench->over, bench->over + SUBMITTERS);
    require(take(signal.fd) == 0, "a signal that was turned off");
    close(signal.fd);
}

static void *run(void *argument) {
    Member *member = argument;
    Core *core = member->bench->core;
    while (!member->bench->quit)
        member->act(member);
    core_unref(core);
    return NULL;
}

/* Threads use the engine, also while `end` ends it. */
static void use(Bench *bench, int arena, void (*end)(Bench *)) {
    Member members[MEMBERS] = {0};
    int home = bench->cuda ? PINNED : PAGEABLE;
    size_t row_bytes = bench->cuda ? CUDA_ROW_BYTES : HOST_ROW_BYTES;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&bench->lock, NULL);
    pthread_cond_init(&bench->changed, &monotonic);
    for (int i = 0; i < MEMBERS; i++) {
        Member *member = &members[i];
        *member = (Member){.bench = bench, .seed = (unsigned)i + 1};
        member->act = i == 0 ? hold : i == 1 ? listen : i < 2 + READERS ? read_one : exchange;
        if (member->act == exchange)
            for (int side = 0; side < 3; side++)
                member->sides[side] = new_side(side == ARENA ? arena : home, row_bytes);
        atomic_fetch_add(&bench->core->refs, 1);
        require(pthread_create(&member->thread, NULL, run, member) == 0, "no thread");
    }
    await_jobs(bench, &bench->over, bench->cuda ? CUDA_JOBS : HOST_JOBS);
    end(bench);
    pthread_mutex_lock(&bench->lock);
    for (int i = 0; i < SHOWN; i++) {
        require(bench->shown[i].job == NULL || look(bench->shown[i]) != JOB_OPEN,
                "a job is open after its engine's end");
        drop(bench->shown[i]);
        bench->shown[i] = (Handle){0};
    }
    bench->quit = 1;
    pthread_cond_broadcast(&bench->changed);
    pthread_mutex_unlock(&bench->lock);
    core_unref(bench->core);
    for (int i = 0; i < MEMBERS; i++)
        pthread_join(members[i].thread, NULL);
    for (int i = 0; i < SHOWN; i++)
        drop(bench->shown[i]);
    for (int i = 2 + READERS; i < MEMBERS; i++)
        for (int side = 0; side < 3; side++)
            free_side(&members[i].sides[side]);
}

/* ------------------------------------------------------------------------------------------------------- the host's */

static Core *open_host(int ordered, int kernel) {
    int error;
    Host *host = host_open(3, QUEUES, ordered, kernel, &error);
    require(host != NULL, "no copy threads");
    return &host->core;
}

static void close_host(Bench *bench) { host_close((Host *)bench->core); }

static void use_host(int ordered, int kernel) {
    Bench bench = {.core = open_host(ordered, kernel)};
    use(&bench, PAGEABLE, close_host);
}

/* A job of all rows, of which one piece was taken. */
static Handle submit_held(Core *core, const Side *dst, const Side *src) {
    set_budget(core, 1, 0);
    Handle handle = submit_rows(core, 1, dst, src, 0, ROWS);
    set_budget(core, 1, 1);
    AWAIT(budget_of(core, 1) == 0, "no piece is taken");
    require(look(handle) == JOB_OPEN, "a job has ended before its last piece");
    return handle;
}

/* Step by step, and what is signalled: a job once, population never. */
static void step_host(unsigned *seed) {
    Side dst = new_side(PAGEABLE, HOST_ROW_BYTES), src = new_side(PAGEABLE, HOST_ROW_BYTES);
    Core *core = open_host(0, kernel_find("portable"));
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    set_signal(core, fd);
    memset(src.memory, 1, src.size);
    Handle handle = submit_held(core, &dst, &src);
    set_budget(core, 1, -1);
    require(wait_for(handle, seed) == JOB_DONE, "a job that was let go has failed");
    compare(&dst, &src, ROWS);
    populate_new(core, seed);
    set_signal(core, -1); /* whoever ended a job has left the lock by now */
    require(take(fd) == 1, "a job was heard of more than once, or not at all, or population was");
    close(fd);
    drop(handle);
    host_close((Host *)core);
    core_unref(core);
    free_side(&dst);
    free_side(&src);
}

/* ----------------------------------------------------------------------------------------------------------- CUDA's */

static CUcontext context;
static CUdeviceptr staging; /* of one engine at a time */

static Cuda *open_cuda(int arena, int may_batch) {
    char *error;
    DirectionLimits limits[DIRECTIONS];
    for (uint64_t i = 0; i < DIRECTIONS; i++)
        limits[i] = (DirectionLimits){3 * SLOT_BYTES, SLOTS, arena == PINNED ? staging + i * SLOTS * SLOT_BYTES : 0};
    Cuda *cuda = cuda_open(context, may_batch, SLOT_BYTES, limits, &error);
    require(cuda != NULL || (error && strstr(error, "999")),
            "a start was refused for another reason than was asked for");
    free(error);
    return cuda;
}

static void use_cuda(int arena, int may_batch, void (*end)(Bench *)) {
    Cuda *cuda = open_cuda(arena, may_batch);
    Bench bench = {.core = cuda_core(cuda), .cuda = cuda};
    use(&bench, arena, end);
}

static void await_end(Cuda *cuda) {
    AWAIT(cuda_wait_end(cuda), "CUDA's thread does not end");
    if (cuda_core(cuda)->broken)
        return;
    require(cuda_refusal(cuda) == NULL, "streams or events were refused");
    require(cudaemu_count("event_create") == cudaemu_count("event_destroy"), "events were not given back");
    require(cudaemu_count("stream_create") == cudaemu_count("stream_destroy"), "streams were not given back");
}

/* One call after the other fails a job; then the end, with jobs under way. Not all engines make all calls. */
static void refuse_and_stop(Bench *bench) {
    static const char *const CALLS[] = {"event_record", "event_query", "memcpy_async", "memcpy_batch_async",
                                        "stream_wait_event"};
    void *streams[2];
    int has[] = {1, 1, 1, cuda_has_batch(bench->cuda), cuda_streams(bench->cuda, 0, streams) == 2};
    cudaemu_inject("event_query", 1, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 0); /* is asked again, and fails none */
    for (int i = 0; i < 5; i++)
        if (has[i]) {
            long before = bench->refused;
            cudaemu_inject(CALLS[i], 3, CUDA_ERROR_UNKNOWN, 0);
            await_jobs(bench, &bench->refused, before + 1);
        }
    cuda_stop(bench->cuda);
    await_end(bench->cuda);
}

/* The thread ends by itself. The memory can be given back once the emulator has forgotten the error. */
static void lose_context(Bench *bench) {
    cudaemu_inject("exec_copy", 5, CUDA_ERROR_ILLEGAL_ADDRESS, 1);
    AWAIT(bench->core->broken, "a lost context is not noticed");
    require(strstr(bench->core->broken, "(CUDA_ERROR_ILLEGAL_ADDRESS, 700)") != NULL,
            "another error than the context's");
    await_end(bench->cuda);
    require(cudaemu_violations() == 0, "violations");
    require(cudaemu_reset() == 0, "a reset");
}

/* A job that is half done when its engine is stopped fails at once, and nothing of CUDA's stays. */
static void stop_half_way(int arena) {
    Side dst = new_side(arena, CUDA_ROW_BYTES), src = new_side(PINNED, CUDA_ROW_BYTES);
    Cuda *cuda = open_cuda(arena, 1);
    Handle handle = submit_held(cuda_core(cuda), &dst, &src);
    AWAIT(cuda_oldest_ns(cuda) == 0, "a piece does not end");
    cuda_stop(cuda);
    require(look(handle) == JOB_FAILED && handle.job->reason == NULL, "a job that was half done has not failed");
    await_end(cuda);
    drop(handle);
    core_unref(cuda_core(cuda));
    free_side(&dst);
    free_side(&src);
}

/* Half of them on each queue. */
static void submit_single_rows(Core *core, const Side *home, const Side *arena, Handle handles[ROWS]) {
    for (int i = 0; i < ROWS; i++)
        handles[i] = submit_rows(core, i % 2, i % 2 ? arena : home, i % 2 ? home : arena, i, 1);
}

/* Nobody waits for it: its thread has the last reference. */
static void leave(void) {
    Handle handles[ROWS];
    Side home = new_side(PINNED, CUDA_ROW_BYTES), arena = new_side(DEVICE, CUDA_ROW_BYTES);
    Cuda *cuda = open_cuda(DEVICE, 1);
    submit_single_rows(cuda_core(cuda), &home, &arena, handles);
    for (int i = 0; i < ROWS; i++)
        drop(handles[i]);
    cuda_stop(cuda);
    core_unref(cuda_core(cuda));
    AWAIT(cudaemu_count("stream_create") == cudaemu_count("stream_destroy"), "an engine that was left does not end");
    free_side(&home);
    free_side(&arena);
}

/* Jobs that cuda_abandon has failed keep a reference for ever, on purpose: the thread may be reading them. Their pointers
 * stay here, so that they are not taken for leaks. */
static Job *kept[(2 + ABANDONED) * ROWS];
static size_t kept_count;

static void drop_abandoned(const Handle *handles, int count) {
    for (int i = 0; i < count; i++) {
        look(handles[i]);
        kept[kept_count++] = handles[i].job;
        drop(handles[i]);
    }
}

/* is_held: no copy of a load ends before its job has failed. Home is pageable: the thread is in a call of the driver's that
 * does not return before that. Otherwise the thread may be anywhere. */
static void abandon(int is_held, int home_kind, unsigned *seed) {
    Handle handles[ROWS];
    void *streams[DIRECTIONS][2];
    Side home = new_side(home_kind, CUDA_ROW_BYTES), arena = new_side(DEVICE, CUDA_ROW_BYTES);
    Cuda *cuda = open_cuda(DEVICE, rand_r(seed) % 2);
    for (int i = 0; i < DIRECTIONS; i++) {
        cuda_streams(cuda, i, streams[i]);
        require(!is_held || cudaemu_hold((uintptr_t)streams[i][0]) == 0, "a hold");
    }
    submit_single_rows(cuda_core(cuda), &home, &arena, handles);
    Handle some = handles[rand_r(seed) % ROWS];
    if (is_held)
        AWAIT(cudaemu_pending((uintptr_t)streams[0][0]) > 1, "no copy is under way");
    else
        AWAIT(look(some) == JOB_DONE, "no copy ends");
    cuda_stop(cuda);
    require(!is_held || !cuda_wait_end(cuda), "the thread has ended before its copies");
    cuda_abandon(cuda);
    require(!is_held || !cuda_is_quiet(cuda), "copies that are held are not under way");
    for (int i = 0; i < ROWS; i++)
        require(look(handles[i]) == JOB_FAILED || (!is_held && look(handles[i]) == JOB_DONE),
                "an abandoned job is open");
    drop_abandoned(handles, ROWS / 2); /* which the thread may be reading */
    require(home_kind == PINNED || !cuda_wait_end(cuda), "the thread has ended in a call of the driver's");
    for (int i = 0; i < DIRECTIONS; i++)
        cudaemu_release((uintptr_t)streams[i][0]);
    core_unref(cuda_core(cuda)); /* the jobs' handles have theirs */
    AWAIT(cuda_wait_end(cuda), "an abandoned thread does not end");
    drop_abandoned(handles + ROWS / 2, ROWS / 2);
    for (int i = 0; i < DIRECTIONS; i++)
        if (cudaemu_pending((uintptr_t)streams[i][0]) >= 0) { /* it was left */
            CHECK(cuStreamSynchronize(streams[i][0]));
            CHECK(cuStreamDestroy(streams[i][0]));
        }
    free_side(&home);
    free_side(&arena);
}

int main(void) {
    unsigned seed = 1;
    signal(SIGALRM, on_alarm);
    alarm(ALARM_S);
    for (size_t i = 0; i < sizeof noise; i++)
        noise[i] = (char)rand_r(&seed);
    use_host(0, kernel_find("portable"));
    use_host(1, kernel_best());
    step_host(&seed);

    CHECK(cuInit(0));
    CHECK(cuDevicePrimaryCtxRetain(&context, 0));
    CHECK(cuCtxPushCurrent(context));
    CHECK(cuMemAlloc(&staging, DIRECTIONS * SLOTS * SLOT_BYTES));
    cudaemu_set_jitter(JITTER_US, 1);
    cudaemu_set_poison(1);
    for (int i = 0; i < 4; i++)
        use_cuda(i % 2 ? PINNED : DEVICE, i / 2, refuse_and_stop);
    stop_half_way(DEVICE);
    stop_half_way(PINNED);
    leave();
    cudaemu_inject("stream_create", 2, CUDA_ERROR_UNKNOWN, 0);
    require(open_cuda(DEVICE, 1) == NULL, "an engine without its streams");
    abandon(1, PINNED, &seed);
    abandon(1, PAGEABLE, &seed);
    for (int i = 0; i < ABANDONED; i++)
        abandon(0, PINNED, &seed);
    use_cuda(PINNED, 1, lose_context);
    puts("native_race: all right");
    return 0;
}
