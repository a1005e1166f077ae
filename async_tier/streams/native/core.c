/* See core.h. */
#include "core.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define WAIT_SLICE_NS (NS_PER_S / 10)

atomic_int fork_generation;

int core_is_forked(const Core *core) { return core->generation != atomic_load(&fork_generation); }

int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * NS_PER_S + t.tv_nsec;
}

struct timespec timespec_of(int64_t ns) { return (struct timespec){.tv_sec = ns / NS_PER_S, .tv_nsec = ns % NS_PER_S}; }

void core_init(Core *core, int queues, int ordered, size_t piece_bytes, void (*release)(Core *)) {
    atomic_init(&core->refs, 1);
    core->generation = atomic_load(&fork_generation);
    core->queue_count = queues;
    core->piece_bytes = piece_bytes;
    core->free = release;
    core->signal = -1;
    for (int i = 0; i < queues; i++) {
        core->queues[i].ordered = ordered;
        core->queues[i].budget = -1;
    }
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&core->lock, NULL);
    pthread_cond_init(&core->work, &monotonic);
    pthread_cond_init(&core->ended, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

void core_unref(Core *core) {
    if (atomic_fetch_sub(&core->refs, 1) != 1)
        return;
    pthread_mutex_destroy(&core->lock);
    pthread_cond_destroy(&core->work);
    pthread_cond_destroy(&core->ended);
    free(core->broken);
    core->free(core);
}

int core_start(Core *core, pthread_t *thread, void *(*run)(void *)) {
    sigset_t all, before;
    sigfillset(&all); /* signals belong to Python's threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    atomic_fetch_add(&core->refs, 1);
    int error = pthread_create(thread, NULL, run, core);
    if (error)
        atomic_fetch_sub(&core->refs, 1);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

/* ------------------------------------------------------------------------------------------------------------- jobs */

Job *job_new(size_t count) {
    Job *job = malloc(sizeof *job + count * sizeof *job->segments);
    if (job) {
        memset(job, 0, sizeof *job);
        atomic_init(&job->refs, 1);
    }
    return job;
}

void job_unref(Job *job) {
    if (atomic_fetch_sub(&job->refs, 1) != 1)
        return;
    free(job->reason);
    free(job);
}

void job_add(Job *job, uint64_t dst, uint64_t src, size_t size) {
    Segment *last = job->count ? &job->segments[job->count - 1] : NULL;
    if (last && last->dst + last->size == (char *)(uintptr_t)dst &&
        last->src + last->size == (const char *)(uintptr_t)src)
        last->size += size;
    else if (size)
        job->segments[job->count++] = (Segment){(char *)(uintptr_t)dst, (const char *)(uintptr_t)src, size};
}

/* lock held. The only place where a job ends. Drops the core's reference. */
static void end_job(Core *core, Job *job) {
    Queue *queue = &core->queues[job->queue];
    if (job->ended_ns == 0)
        job->ended_ns = now_ns();
    atomic_store_explicit(&job->state, job->failed ? JOB_FAILED : JOB_DONE, memory_order_release);
    if (queue->running == job) {
        queue->running = NULL;
        if (queue->head)
            pthread_cond_broadcast(&core->work);
    }
    if (core->waiters)
        pthread_cond_broadcast(&core->ended);
    if (core->signal >= 0 && !job->populates) {
        /* Errors do not matter: a full eventfd is readable, and nobody reads a closed one. */
        ssize_t ignored = write(core->signal, &(uint64_t){1}, sizeof(uint64_t));
        (void)ignored;
    }
    job_unref(job);
}

void core_submit(Core *core, int queue_index, Job *job) {
    atomic_fetch_add(&job->refs, 1); /* the core's */
    job->queue = queue_index;
    int is_queued = 0;
    size_t total = 0;
    for (size_t i = 0; i < job->count && total <= core->piece_bytes; i++)
        total += job->segments[i].size;
    pthread_mutex_lock(&core->lock);
    Queue *queue = &core->queues[queue_index];
    if (core->stop || core->broken || job->count == 0) {
        job->failed = core->stop || core->broken;
        end_job(core, job);
    } else {
        is_queued = 1;
        if (queue->tail)
            queue->tail->after = job;
        else
            queue->head = job;
        queue->tail = job;
    }
    pthread_mutex_unlock(&core->lock);
    /* After unlocking, so that no thread wakes up only to wait for the lock. */
    if (is_queued && total > core->piece_bytes)
        pthread_cond_broadcast(&core->work);
    else if (is_queued)
        pthread_cond_signal(&core->work);
}

void core_wait(Core *core, Job *job) {
    struct timespec until = timespec_of(now_ns() + WAIT_SLICE_NS);
    pthread_mutex_lock(&core->lock);
    core->waiters++;
    if (atomic_load(&job->state) == JOB_OPEN)
        pthread_cond_timedwait(&core->ended, &core->lock, &until);
    core->waiters--;
    pthread_mutex_unlock(&core->lock);
}

/* ----------------------------------------------------------------------------------------------------------- pieces */

int core_may_claim(const Queue *queue) {
    return queue->head && queue->budget != 0 && !(queue->ordered && queue->running);
}

/* Removes the queue's first job. */
static void pop_job(Queue *queue) {
    queue->head = queue->head->after;
    if (queue->head == NULL)
        queue->tail = NULL;
}

Piece core_claim(Queue *queue, size_t max_bytes, size_t max_segments) {
    Job *job = queue->head;
    Piece piece = {.job = job, .at = job->next, .offset = job->next_off};
    piece.is_first = piece.at == 0 && piece.offset == 0;
    size_t left = max_bytes;
    while (job->next < job->count && left > 0 && job->next - piece.at < max_segments) {
        size_t rest = job->segments[job->next].size - job->next_off;
        if (rest > left) {
            job->next_off += left;
            left = 0;
        } else {
            left -= rest;
            job->next++, job->next_off = 0;
        }
    }
    piece.bytes = max_bytes - left;
    piece.is_last = job->next == job->count;
    if (queue->budget > 0)
        queue->budget--;
    job->outstanding++;
    atomic_fetch_add(&job->refs, 1);
    if (piece.is_last) {
        pop_job(queue);
        if (queue->ordered)
            queue->running = job;
    }
    if (job->started_ns == 0)
        job->started_ns = now_ns();
    return piece;
}

void core_settle(Core *core, Job *job) {
    if (--job->outstanding == 0 && (job->next == job->count || job->failed))
        end_job(core, job);
    job_unref(job);
}

void core_fail(Core *core, Job *job, char *reason) {
    Queue *queue = &core->queues[job->queue];
    if (queue->head == job)
        pop_job(queue);
    if (job->reason)
        free(reason); /* the first reason counts */
    else
        job->reason = reason;
    job->failed = 1;
    if (job->outstanding == 0)
        end_job(core, job);
}

void core_cancel(Core *core) {
    for (int i = 0; i < core->queue_count; i++)
        while (core->queues[i].head)
            core_fail(core, core->queues[i].head, NULL);
}
