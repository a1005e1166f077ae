/* `_native`: the Python module of the core and its executors. */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cuda.h"
#include "host.h"
#include "table.h"

/* Not 4096 everywhere. */
static unsigned long long page_bytes(void) { return (unsigned long long)sysconf(_SC_PAGESIZE); }

static void in_forked_child(void) {
    atomic_fetch_add(&fork_generation, 1);
    kernel_after_fork();
}

/* --------------------------------------------------------------------------------------------------- the Job handle */

typedef struct {
    PyObject_HEAD
    Core *core;
    Job *job;
} JobObject;

static PyTypeObject *job_type;

static int check_generation(const Core *core) {
    if (!core_is_forked(core))
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

static int state_of(PyObject *self) {
    return atomic_load_explicit(&((JobObject *)self)->job->state, memory_order_acquire);
}

/* Whether the job has ended. In a forked child it never does: -1, with an exception set, unless its engine was closed
 * there. */
static int has_ended(PyObject *self) {
    Core *core = ((JobObject *)self)->core;
    if (state_of(self) != JOB_OPEN)
        return 1;
    if (core_is_forked(core) && core->stop)
        return 1;
    return check_generation(core);
}

static PyObject *job_is_done(PyObject *self, void *unused) {
    int ended = has_ended(self);
    return ended < 0 ? NULL : PyBool_FromLong(ended);
}

static PyObject *job_failed(PyObject *self, void *unused) {
    int state = state_of(self);
    return PyBool_FromLong(state == JOB_FAILED || (state == JOB_OPEN && core_is_forked(((JobObject *)self)->core)));
}

/* The reason and the times may be read once the state is not JOB_OPEN. */
static PyObject *job_reason(PyObject *self, void *unused) {
    Job *job = ((JobObject *)self)->job;
    if (state_of(self) == JOB_OPEN || job->reason == NULL)
        Py_RETURN_NONE;
    return PyUnicode_DecodeUTF8(job->reason, (Py_ssize_t)strlen(job->reason), "replace");
}

static PyObject *job_seconds(PyObject *self, void *unused) {
    Job *job = ((JobObject *)self)->job;
    if (state_of(self) == JOB_OPEN || job->started_ns == 0)
        return PyFloat_FromDouble(0.0);
    return PyFloat_FromDouble((double)(job->ended_ns - job->started_ns) * 1e-9);
}

static PyObject *job_spans(PyObject *self, void *unused) {
    Job *job = ((JobObject *)self)->job;
    if (state_of(self) != JOB_DONE || job->started_ns == 0)
        return PyList_New(0);
    long long started = job->started_ns, ended = job->ended_ns;
    if (job->in_ended_ns == 0)
        return Py_BuildValue("[(sLL)]", "copy", started, ended);
    return Py_BuildValue("[(sLL)(sLL)]", "in", started, (long long)job->in_ended_ns, "out",
                         (long long)job->out_started_ns, ended);
}

static PyObject *job_synchronize(PyObject *self, PyObject *args) {
    JobObject *handle = (JobObject *)self;
    double seconds = 1e9;
    if (!PyArg_ParseTuple(args, "|d", &seconds))
        return NULL;
    int64_t until = now_ns() + (int64_t)(seconds * 1e9);
    int ended;
    while ((ended = has_ended(self)) == 0 && now_ns() < until) { /* in slices, so that Ctrl-C is handled */
        Py_BEGIN_ALLOW_THREADS
        core_wait(handle->core, handle->job);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals())
            return NULL;
    }
    return ended < 0 ? NULL : PyBool_FromLong(ended);
}

static PyGetSetDef job_getset[] = {
    {"is_done", job_is_done, NULL, "Whether every copy of the job has ended. Never blocks.", NULL},
    {"failed", job_failed, NULL, "Whether some bytes did not arrive. Only meaningful once is_done.", NULL},
    {"reason", job_reason, NULL, "Why it failed; None if it did not, or if the engine ended.", NULL},
    {"seconds", job_seconds, NULL, "From the start of the first copy to the end of the last; 0.0 until is_done.", NULL},
    {"spans", job_spans, NULL,
     "When the copies were made: (leg, start, end) of each leg, in ns of CLOCK_MONOTONIC. Empty until they have ended, "
     "and if they failed or there were none.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef job_methods[] = {
    {"synchronize", job_synchronize, METH_VARARGS,
     "synchronize(seconds) -> bool\n\nBlock, without the GIL, until is_done, at most for so long. Returns is_done."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot job_slots[] = {
    {Py_tp_dealloc, job_dealloc},
    {Py_tp_getset, job_getset},
    {Py_tp_methods, job_methods},
    {Py_tp_doc, "The event of one submitted list of copies."},
    {0, NULL},
};
static PyType_Spec job_spec = {"async_tier.streams._native.Job", sizeof(JobObject), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, job_slots};

/* -------------------------------------------------------------------------------------- what engines have in common */

typedef struct {
    PyObject_HEAD
    Core *core; /* of a Host or a Cuda */
} EngineObject;

static Core *core_of(PyObject *self) { return ((EngineObject *)self)->core; }

/* The Python object of a new engine, which takes over the reference to the core. NULL for a core that is NULL. */
static PyObject *new_engine(PyTypeObject *type, Core *core) {
    EngineObject *self = core ? (EngineObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0) : NULL;
    if (self)
        self->core = core;
    return (PyObject *)self;
}

static void free_engine(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int check_queue(const Core *core, int queue_index) {
    if (queue_index >= 0 && queue_index < core->queue_count)
        return 0;
    PyErr_Format(PyExc_ValueError, "queue must be 0 to %d, not %d", core->queue_count - 1, queue_index);
    return -1;
}

/* A job with room for `count` segments; NULL, with an exception set, if there is no memory. */
static Job *new_job(size_t count) {
    Job *job = job_new(count);
    if (job == NULL)
        PyErr_NoMemory();
    return job;
}

/* Queues the job and returns its handle. Takes over the job, even if this fails. */
static PyObject *submit(Core *core, int queue_index, Job *job) {
    JobObject *handle = (JobObject *)((allocfunc)PyType_GetSlot(job_type, Py_tp_alloc))(job_type, 0);
    if (handle == NULL) {
        job_unref(job);
        return NULL;
    }
    handle->job = job;
    handle->core = core;
    atomic_fetch_add(&core->refs, 1);
    core_submit(core, queue_index, job);
    return (PyObject *)handle;
}

/* The address of row rows[i]. If that is no row, *failed is -1, with an exception set. */
static inline uint64_t row_address(PyObject *rows, Py_ssize_t i, unsigned long long base, unsigned long long stride,
                                   unsigned long long count, int *failed) {
    unsigned long long row = PyLong_AsUnsignedLongLong(PyList_GetItem(rows, i));
    if (row >= count) { /* also if the conversion failed */
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "row %llu is not below %llu", row, count);
        *failed = -1;
    }
    return base + row * stride;
}

static PyObject *engine_submit_rows(PyObject *self, PyObject *args) {
    Core *core = core_of(self);
    int queue_index, failed = 0;
    unsigned long long dst, dst_stride, dst_count, src, src_stride, src_count, dst_alignment = 0, src_alignment = 0;
    PyObject *dst_rows, *src_rows;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "iKKKOKKKOn|KK", &queue_index, &dst, &dst_stride, &dst_count, &dst_rows, &src,
                          &src_stride, &src_count, &src_rows, &size, &dst_alignment, &src_alignment))
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
        job_add(job, to, from, (size_t)size);
    }
    if (failed) {
        job_unref(job);
        return NULL;
    }
    job->dst_grid = (Grid){dst - dst % page_bytes(), (size_t)dst_alignment};
    job->src_grid = (Grid){src - src % page_bytes(), (size_t)src_alignment};
    return submit(core, queue_index, job);
}

/* For tests only: set the budget of a queue, in pieces. */
static PyObject *engine_limit(PyObject *self, PyObject *args) {
    Core *core = core_of(self);
    int queue_index;
    long pieces;
    if (!PyArg_ParseTuple(args, "il", &queue_index, &pieces) || check_generation(core) ||
        check_queue(core, queue_index))
        return NULL;
    pthread_mutex_lock(&core->lock);
    core->queues[queue_index].budget = pieces;
    pthread_cond_broadcast(&core->work);
    pthread_mutex_unlock(&core->lock);
    Py_RETURN_NONE;
}

static PyObject *engine_signal(PyObject *self, PyObject *args) {
    Core *core = core_of(self);
    int fd;
    if (!PyArg_ParseTuple(args, "i", &fd) || check_generation(core))
        return NULL;
    pthread_mutex_lock(&core->lock);
    core->signal = fd;
    pthread_mutex_unlock(&core->lock);
    Py_RETURN_NONE;
}

#define COMMON_METHODS                                                                                                 \
    {"submit_rows", engine_submit_rows, METH_VARARGS,                                                                  \
     "submit_rows(queue, dst, dst_stride, dst_count, dst_rows, src, src_stride, src_count, src_rows, size, "           \
     "dst_alignment=0, src_alignment=0) -> Job\n\n"                                                                    \
     "Queue copies of rows of size bytes: from row src_rows[i] to row dst_rows[i], lists of integers below the\n"      \
     "counts. The memory must stay valid until the job is done. The cost depends on the number of rows only. With\n"   \
     "CUDA, no copy crosses a multiple of a side's alignment (if not 0), counted from its first row's page."},         \
        {"limit", engine_limit, METH_VARARGS,                                                                          \
         "limit(queue, pieces)\n\n"                                                                                    \
         "For tests: let the threads claim this many more pieces of the queue (0 holds it, -1 lifts the limit)."},     \
        {"signal", engine_signal, METH_VARARGS,                                                                        \
         "signal(fd)\n\nFrom now on write to this non-blocking eventfd when a job has ended; -1 to stop. The "         \
         "caller still owns it, and must stop this before closing it."}

/* ------------------------------------------------------------------------------------------------ the host's engine */

static Host *host_of(PyObject *self) { return (Host *)core_of(self); }

/* The number of the kernel called `name`, or of the best one for NULL. -1, with an exception set, if there is none. */
static int find_kernel(const char *name) {
    int found;
    if (name == NULL) {
        Py_BEGIN_ALLOW_THREADS
        found = kernel_best();
        Py_END_ALLOW_THREADS
    } else if ((found = kernel_find(name)) < 0) {
        PyErr_Format(PyExc_ValueError, "copy kernel '%s' is unknown or not supported by this processor", name);
    }
    return found;
}

static PyObject *host_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"threads", "queues", "ordered", "kernel", NULL};
    int threads, queues, ordered = 0, error;
    const char *kernel_asked = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ii|pz", names, &threads, &queues, &ordered, &kernel_asked))
        return NULL;
    if (threads < 1 || threads > MAX_THREADS || queues < 1 || queues > MAX_QUEUES) {
        PyErr_Format(PyExc_ValueError, "threads must be 1 to %d and queues 1 to %d, not %d and %d", MAX_THREADS,
                     MAX_QUEUES, threads, queues);
        return NULL;
    }
    int kernel = find_kernel(kernel_asked);
    if (kernel < 0)
        return NULL;
    Host *host;
    Py_BEGIN_ALLOW_THREADS
    host = host_open(threads, queues, ordered, kernel, &error);
    Py_END_ALLOW_THREADS
    if (host == NULL) {
        PyErr_Format(PyExc_RuntimeError, "cannot start %d copy threads: %s", threads, strerror(error));
        return NULL;
    }
    PyObject *self = new_engine(type, &host->core);
    if (self == NULL) {
        host_close(host);
        core_unref(&host->core);
    }
    return self;
}

static PyObject *host_close_method(PyObject *self, PyObject *unused) {
    Host *host = host_of(self);
    if (core_is_forked(&host->core)) {
        host->core.stop = 1;
        Py_RETURN_NONE;
    }
    Py_BEGIN_ALLOW_THREADS
    host_close(host);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static void host_dealloc(PyObject *self) {
    Host *host = host_of(self);
    /* An engine that nobody closed: its threads must not outlive the memory they copy. A forked child has no threads,
     * and its copy of the lock may be locked forever. */
    if (host && !core_is_forked(&host->core)) {
        host_close(host);
        core_unref(&host->core);
    }
    free_engine(self);
}

/* The buffer of an array of addresses or sizes: contiguous, native integers of 8 bytes. */
static int get_words(PyObject *object, Py_buffer *view, const char *name) {
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT))
        return -1;
    const char *format = view->format ? view->format : "B";
    if (view->itemsize == 8 && strchr("QLNqln", format[strlen(format) - 1]) && !strchr(">!", format[0]))
        return 0;
    PyErr_Format(PyExc_TypeError, "%s must hold native 8-byte integers, not %zd-byte items of format '%s'", name,
                 view->itemsize, format);
    PyBuffer_Release(view);
    return -1;
}

static PyObject *host_submit(PyObject *self, PyObject *args) {
    Core *core = core_of(self);
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
        job_add(job, d[i], s[i], has_sizes ? (size_t)z[i] : uniform);
    result = submit(core, queue_index, job);

release_all:
    if (has_sizes)
        PyBuffer_Release(&sizes);
release_src:
    PyBuffer_Release(&src);
release_dst:
    PyBuffer_Release(&dst);
    return result;
}

/* Checks that memory to populate starts on a page; 0, or -1 with an exception set. */
static int check_start(unsigned long long address) {
    if (address != 0 && address % page_bytes() == 0)
        return 0;
    PyErr_Format(PyExc_ValueError, "memory to populate must start on a page, not at %llu", address);
    return -1;
}

static PyObject *host_populate(PyObject *self, PyObject *args) {
    Core *core = core_of(self);
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
    job_add(job, address, 0, (size_t)size);
    return submit(core, queue_index, job);
}

static PyObject *host_thread_ids(PyObject *self, void *unused) {
    Host *host = host_of(self);
    PyObject *ids = PyList_New(host->thread_count);
    for (int i = 0; ids && i < host->thread_count; i++) {
        PyObject *id = PyLong_FromLong(host->tids[i]);
        if (id == NULL || PyList_SetItem(ids, i, id))
            Py_CLEAR(ids);
    }
    return ids;
}

static PyObject *host_kernel(PyObject *self, void *unused) {
    return PyUnicode_FromString(kernel_name(host_of(self)->kernel));
}

static PyGetSetDef host_getset[] = {
    {"kernel", host_kernel, NULL, "Name of the copy kernel in use.", NULL},
    {"thread_ids", host_thread_ids, NULL, "The kernel's ids of the copy threads.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef host_methods[] = {
    COMMON_METHODS,
    {"submit", host_submit, METH_VARARGS,
     "submit(queue, dst, src, size) -> Job\n\n"
     "Queue copies of size[i] bytes (or size bytes each) from address src[i] to dst[i]. The arrays are copied; the\n"
     "memory at the addresses must stay valid until the job is done. The cost depends on their number only."},
    {"populate", host_populate, METH_VARARGS,
     "populate(queue, address, size) -> Job\n\n"
     "Queue a job that backs size bytes from address, the start of a page, with memory, a huge page at a time. The\n"
     "contents stay. The mapping must stay valid until the job is done, which is not signalled."},
    {"close", host_close_method, METH_NOARGS,
     "End the threads. Pieces being copied are finished; unfinished jobs fail. Idempotent."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot host_slots[] = {
    {Py_tp_new, host_new},
    {Py_tp_dealloc, host_dealloc},
    {Py_tp_getset, host_getset},
    {Py_tp_methods, host_methods},
    {Py_tp_doc,
     "HostEngine(threads, queues, ordered=False, kernel=None)\n\nCopy threads and the queues they serve, lowest "
     "first."},
    {0, NULL},
};
static PyType_Spec host_spec = {"async_tier.streams._native.HostEngine", sizeof(EngineObject), 0, Py_TPFLAGS_DEFAULT,
                                host_slots};

/* ---------------------------------------------------------------------------------------------------- CUDA's engine */

static Cuda *cuda_of(PyObject *self) { return (Cuda *)core_of(self); }

static PyObject *cuda_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"context", "batch", "piece_bytes", "loads", "stores", NULL};
    unsigned long long context, piece_bytes, bytes[DIRECTIONS], staging[DIRECTIONS];
    int may_batch, pieces[DIRECTIONS];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KpK(KiK)(KiK)", names, &context, &may_batch, &piece_bytes,
                                     &bytes[0], &pieces[0], &staging[0], &bytes[1], &pieces[1], &staging[1]))
        return NULL;
    DirectionLimits limits[DIRECTIONS];
    for (int i = 0; i < DIRECTIONS; i++) {
        if (pieces[i] < 1 || pieces[i] > MAX_PIECES || piece_bytes == 0) {
            PyErr_Format(PyExc_ValueError, "pieces must be 1 to %d, not %d, of at least one byte", MAX_PIECES,
                         pieces[i]);
            return NULL;
        }
        limits[i] = (DirectionLimits){(size_t)bytes[i], pieces[i], staging[i]};
    }
    char *error = NULL;
    Cuda *cuda;
    Py_BEGIN_ALLOW_THREADS
    cuda = cuda_open((void *)(uintptr_t)context, may_batch, (size_t)piece_bytes, limits, &error);
    Py_END_ALLOW_THREADS
    if (cuda == NULL) {
        PyErr_SetString(PyExc_RuntimeError, error ? error : "no memory");
        free(error);
        return NULL;
    }
    PyObject *self = new_engine(type, cuda_core(cuda));
    if (self == NULL) {
        cuda_stop(cuda);
        core_unref(cuda_core(cuda));
    }
    return self;
}

static PyObject *cuda_close(PyObject *self, PyObject *args) {
    Cuda *cuda = cuda_of(self);
    double seconds;
    if (!PyArg_ParseTuple(args, "d", &seconds))
        return NULL;
    if (core_is_forked(cuda_core(cuda))) {
        cuda_core(cuda)->stop = 1;
        Py_RETURN_TRUE;
    }
    int64_t until = now_ns() + (int64_t)(seconds * 1e9);
    int has_ended, is_late;
    do { /* in slices, so that Ctrl-C is handled */
        Py_BEGIN_ALLOW_THREADS
        cuda_stop(cuda);
        has_ended = cuda_wait_end(cuda);
        is_late = now_ns() >= until; /* once, before getting the GIL back, which takes time */
        if (!has_ended && is_late)
            cuda_abandon(cuda);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals())
            return NULL;
    } while (!has_ended && !is_late);
    return PyBool_FromLong(cuda_is_quiet(cuda));
}

static void cuda_dealloc(PyObject *self) {
    Cuda *cuda = cuda_of(self);
    /* An engine that nobody closed: its thread ends when the copies under way have. */
    if (cuda && !core_is_forked(cuda_core(cuda))) {
        cuda_stop(cuda);
        core_unref(cuda_core(cuda));
    }
    free_engine(self);
}

static PyObject *text_or_none(const char *text) {
    if (text == NULL)
        Py_RETURN_NONE;
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

static PyObject *cuda_broken(PyObject *self, void *unused) { return text_or_none(core_of(self)->broken); }

static PyObject *cuda_refusal_of(PyObject *self, void *unused) { return text_or_none(cuda_refusal(cuda_of(self))); }

static PyObject *cuda_batches(PyObject *self, void *unused) { return PyBool_FromLong(cuda_has_batch(cuda_of(self))); }

static PyObject *cuda_seconds_under_way(PyObject *self, void *unused) {
    int64_t oldest = cuda_oldest_ns(cuda_of(self));
    return PyFloat_FromDouble(oldest ? (double)(now_ns() - oldest) * 1e-9 : 0.0);
}

static PyObject *cuda_handles(PyObject *self, PyObject *args) {
    int direction;
    if (!PyArg_ParseTuple(args, "i", &direction) || check_queue(core_of(self), direction))
        return NULL;
    void *handles[2];
    int count = cuda_streams(cuda_of(self), direction, handles);
    PyObject *numbers = PyList_New(count);
    for (int i = 0; numbers && i < count; i++) {
        PyObject *number = PyLong_FromVoidPtr(handles[i]);
        if (number == NULL || PyList_SetItem(numbers, i, number))
            Py_CLEAR(numbers);
    }
    return numbers;
}

static PyGetSetDef cuda_getset[] = {
    {"broken", cuda_broken, NULL, "Why it can copy no more; None while it can.", NULL},
    {"has_batch", cuda_batches, NULL, "Whether one call queues many copies.", NULL},
    {"refusal", cuda_refusal_of, NULL, "Once closed: why the driver did not destroy streams or events, or None.", NULL},
    {"seconds_under_way", cuda_seconds_under_way, NULL, "How long the oldest piece has been under way; 0.0 if none is.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef cuda_methods[] = {
    COMMON_METHODS,
    {"handles", cuda_handles, METH_VARARGS, "handles(queue) -> list[int]\n\nThe CUDA streams of a queue, one per leg."},
    {"close", cuda_close, METH_VARARGS,
     "close(seconds) -> bool\n\n"
     "Start nothing more, and wait for copies under way, but no longer than this. Whether they and the thread have\n"
     "ended. If not, all jobs have failed, and streams and events stay. Idempotent."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot cuda_slots[] = {
    {Py_tp_new, cuda_new},
    {Py_tp_dealloc, cuda_dealloc},
    {Py_tp_getset, cuda_getset},
    {Py_tp_methods, cuda_methods},
    {Py_tp_doc,
     "CudaEngine(context, batch, piece_bytes, loads, stores)\n\n"
     "A thread with streams of its own in a context: queue 0 is for loads, queue 1 for stores. loads, stores:\n"
     "(most bytes under way, most pieces under way, address of a staging slot per piece, or 0). Raises\n"
     "RuntimeError if CUDA refuses it."},
    {0, NULL},
};
static PyType_Spec cuda_spec = {"async_tier.streams._native.CudaEngine", sizeof(EngineObject), 0, Py_TPFLAGS_DEFAULT,
                                cuda_slots};

/* ------------------------------------------------------------------------------------------------------- the module */

static PyObject *module_kernels(PyObject *self, PyObject *unused) {
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < MAX_KERNELS; i++) {
        if (kernel_name(i) == NULL)
            continue;
        PyObject *name = PyUnicode_FromString(kernel_name(i));
        if (name == NULL || PyList_Append(names, name))
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *module_copy(PyObject *self, PyObject *args) {
    unsigned long long dst, src, size;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "KKK|z", &dst, &src, &size, &name))
        return NULL;
    int kernel = find_kernel(name);
    if (kernel < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    kernel_copy(kernel, (char *)(uintptr_t)dst, (const char *)(uintptr_t)src, (size_t)size);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *module_populate(PyObject *self, PyObject *args) {
    unsigned long long address, size;
    if (!PyArg_ParseTuple(args, "KK", &address, &size) || check_start(address))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    populate((char *)(uintptr_t)address, (size_t)size);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *module_prefer_node(PyObject *self, PyObject *args) {
    unsigned long long address, size;
    unsigned node;
    if (!PyArg_ParseTuple(args, "KKI", &address, &size, &node) || check_start(address))
        return NULL;
    if ((errno = prefer_node((char *)(uintptr_t)address, (size_t)size, node)))
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"kernels", module_kernels, METH_NOARGS, "Names of the copy kernels this processor supports."},
    {"copy", module_copy, METH_VARARGS,
     "copy(dst, src, size, kernel=None)\n\nCopy size bytes between addresses on the calling thread, without the GIL."},
    {"populate", module_populate, METH_VARARGS,
     "populate(address, size)\n\nHostEngine.populate on the calling thread, without the GIL."},
    {"prefer_node", module_prefer_node, METH_VARARGS,
     "prefer_node(address, size, node)\n\n"
     "Have new memory come from a NUMA node as far as it has some. Does nothing if this thread has a NUMA policy, as\n"
     "set by numactl. Raises OSError."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module_def = {PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1,
                                        .m_doc = "The core of the copy engines; see streams/native/core.h.",
                                        .m_methods = module_methods};

/* Adds a new type to the module. NULL if that fails. */
static PyObject *add_type(PyObject *module, PyType_Spec *spec, const char *name) {
    PyObject *type = module ? PyType_FromSpec(spec) : NULL;
    if (type && PyModule_AddObjectRef(module, name, type))
        Py_CLEAR(type);
    return type;
}

PyMODINIT_FUNC PyInit__native(void) {
    static int is_watching;
    if (!is_watching) {
        if (pthread_atfork(NULL, NULL, in_forked_child))
            return PyErr_NoMemory();
        is_watching = 1;
    }
    PyObject *module = PyModule_Create(&module_def);
    PyObject *host = add_type(module, &host_spec, "HostEngine"), *cuda = add_type(module, &cuda_spec, "CudaEngine");
    job_type = (PyTypeObject *)add_type(module, &job_spec, "Job");
    if (host == NULL || cuda == NULL || job_type == NULL || table_add(module))
        Py_CLEAR(module);
    Py_XDECREF(host);
    Py_XDECREF(cuda);
    return module;
}
