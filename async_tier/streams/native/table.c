/* The table of a pool: which row of a file holds which block. It is memory that processes share: one owner writes it,
 * and peers read it, without a lock. The owner may be killed between any two instructions.
 *
 * A record's `word` is (serial << 1) | ready. Each time that a row is taken for another block it gets a serial number
 * that no row of the file ever had. The order of the owner's writes is what keeps the rest simple:
 *
 *   take       word: a new serial, not ready     before the first byte of the row changes
 *              key, parent
 *   (copies)   the row's bytes
 *   publish    word: ready                       after the last byte has arrived
 *
 * So a record that is ready has the key and all bytes of one block, whenever the owner dies. And a peer that reads the
 * same ready word before and after it copied a row has copied that block, whole.
 *
 * `epoch` is odd from the owner's reset on: no record counts then. `ring` has the rows whose records changed last, so
 * that a peer need not read all of them again; `changes` counts them.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "table.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#define HEADER_BYTES 4096 /* the first half belongs to memory/pool.py */
#define RING 65536
#define KEY_BYTES 40 /* vLLM's keys: a hash of 32 bytes and the number of a KV group of 4 */

typedef struct {
    unsigned char description[HEADER_BYTES / 2];
    _Atomic uint64_t epoch, serial;
    unsigned char between[HEADER_BYTES / 2 - 32];
    _Atomic uint64_t changes;
    uint64_t unused;
    _Atomic uint32_t ring[RING];
} Header;

typedef struct {
    _Atomic uint64_t word;
    uint64_t parent_serial;
    int32_t parent; /* the row of the block that this one continues, while it has that serial; -1: none */
    uint16_t key_bytes, unused;
    unsigned char key[KEY_BYTES];
} Record;

typedef struct {
    PyObject_HEAD
    Header *header;
    int64_t *used_at; /* by row, in us of CLOCK_MONOTONIC; may be somewhat older than the owner's own */
    Record *records;
    Py_ssize_t capacity;
    int fd; /* of the file; the caller's */
    long long size;
} Table;

static Table *table_of(PyObject *self) { return (Table *)self; }

static PyObject *table_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"address", "capacity", "fd", "size", NULL};
    unsigned long long address;
    Py_ssize_t capacity;
    int fd;
    long long size;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "KniL", names, &address, &capacity, &fd, &size))
        return NULL;
    Table *self = (Table *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL)
        return NULL;
    self->capacity = capacity;
    self->fd = fd;
    self->size = size;
    self->header = (Header *)(uintptr_t)address;
    self->used_at = (int64_t *)(self->header + 1);
    self->records = (Record *)(self->used_at + capacity + (capacity & 7 ? 8 - (capacity & 7) : 0));
    return (PyObject *)self;
}

static void table_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *table_bytes(PyObject *unused, PyObject *argument) {
    Py_ssize_t capacity = PyLong_AsSsize_t(argument);
    if (capacity == -1 && PyErr_Occurred())
        return NULL;
    Py_ssize_t padded = (capacity + 7) / 8 * 8;
    return PyLong_FromSsize_t((Py_ssize_t)sizeof(Header) + padded * (Py_ssize_t)(sizeof(int64_t) + sizeof(Record)));
}

/* The record of row rows[i] of a list; NULL, with an exception set, if that is no row. */
static Record *record_of(Table *table, PyObject *rows, Py_ssize_t i, Py_ssize_t *row) {
    *row = PyLong_AsSsize_t(PyList_GetItem(rows, i));
    if (*row >= 0 && *row < table->capacity)
        return &table->records[*row];
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "row %zd is not from 0 to %zd", *row, table->capacity - 1);
    return NULL;
}

static int check_lists(PyObject *rows, PyObject *others) {
    if (!PyList_Check(rows) || (others && (!PyList_Check(others) || PyList_Size(others) != PyList_Size(rows)))) {
        PyErr_SetString(PyExc_TypeError, "a table takes lists of one length");
        return -1;
    }
    return 0;
}

static void note_change(Header *header, Py_ssize_t row) {
    uint64_t at = atomic_load_explicit(&header->changes, memory_order_relaxed);
    atomic_store_explicit(&header->ring[at % RING], (uint32_t)row, memory_order_relaxed);
    atomic_store_explicit(&header->changes, at + 1, memory_order_release);
}

/* Whether all items of a list are keys that a record has room for. */
static int keys_fit(PyObject *keys) {
    for (Py_ssize_t i = 0; i < PyList_Size(keys); i++) {
        PyObject *key = PyList_GetItem(keys, i);
        if (!PyBytes_Check(key) || PyBytes_Size(key) < 1 || PyBytes_Size(key) > KEY_BYTES)
            return 0;
    }
    return 1;
}

static PyObject *table_fits(PyObject *self, PyObject *keys) {
    return check_lists(keys, NULL) ? NULL : PyBool_FromLong(keys_fit(keys));
}

static PyObject *table_take(PyObject *self, PyObject *args) {
    Table *table = table_of(self);
    Header *header = table->header;
    PyObject *rows, *keys;
    Py_ssize_t above, row;
    if (!PyArg_ParseTuple(args, "OOn", &rows, &keys, &above) || check_lists(rows, keys))
        return NULL;
    Py_ssize_t count = PyList_Size(rows);
    for (Py_ssize_t i = 0; i < count; i++) /* all are checked before the first is changed */
        if (record_of(table, rows, i, &row) == NULL)
            return NULL;
    if (!keys_fit(keys)) {
        PyErr_Format(PyExc_ValueError, "a key in a pool is 1 to %d bytes", KEY_BYTES);
        return NULL;
    }
    uint64_t serial = atomic_load_explicit(&header->serial, memory_order_relaxed);
    atomic_store_explicit(&header->serial, serial + (uint64_t)count, memory_order_relaxed);
    for (Py_ssize_t i = 0; i < count; i++) {
        Record *record = record_of(table, rows, i, &row);
        uint64_t word = atomic_exchange_explicit(&record->word, (serial + (uint64_t)i) << 1, memory_order_relaxed);
        if (word & 1)
            note_change(header, row);
    }
    atomic_thread_fence(memory_order_release); /* no reader sees a key, or a byte, of what comes now with an old word */
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    int64_t now = (int64_t)time.tv_sec * 1000000 + time.tv_nsec / 1000;
    for (Py_ssize_t i = 0; i < count; i++) {
        Record *record = record_of(table, rows, i, &row);
        char *key;
        Py_ssize_t size;
        PyBytes_AsStringAndSize(PyList_GetItem(keys, i), &key, &size);
        memcpy(record->key, key, (size_t)size);
        record->key_bytes = (uint16_t)size;
        int has_parent = above >= 0 && above < table->capacity;
        record->parent = has_parent ? (int32_t)above : -1;
        record->parent_serial =
            has_parent ? atomic_load_explicit(&table->records[above].word, memory_order_relaxed) >> 1 : 0;
        table->used_at[row] = now - i;
        above = row;
    }
    Py_RETURN_NONE;
}

static PyObject *set_ready(Table *table, PyObject *rows, uint64_t ready) {
    Py_ssize_t row;
    if (check_lists(rows, NULL))
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_Size(rows); i++) {
        Record *record = record_of(table, rows, i, &row);
        if (record == NULL)
            return NULL;
        uint64_t word = ready ? atomic_fetch_or_explicit(&record->word, 1, memory_order_release)
                              : atomic_fetch_and_explicit(&record->word, ~UINT64_C(1), memory_order_relaxed);
        if ((word & 1) != ready)
            note_change(table->header, row);
    }
    Py_RETURN_NONE;
}

static PyObject *table_publish(PyObject *self, PyObject *rows) { return set_ready(table_of(self), rows, 1); }

static PyObject *table_withdraw(PyObject *self, PyObject *rows) { return set_ready(table_of(self), rows, 0); }

static PyObject *table_begin_reset(PyObject *self, PyObject *unused) {
    atomic_fetch_or_explicit(&table_of(self)->header->epoch, 1, memory_order_seq_cst);
    Py_RETURN_NONE;
}

static PyObject *table_end_reset(PyObject *self, PyObject *unused) {
    Table *table = table_of(self);
    for (Py_ssize_t row = 0; row < table->capacity; row++)
        atomic_fetch_and_explicit(&table->records[row].word, ~UINT64_C(1), memory_order_relaxed);
    uint64_t epoch = atomic_load_explicit(&table->header->epoch, memory_order_relaxed);
    atomic_store_explicit(&table->header->epoch, (epoch | 1) + 1, memory_order_release);
    Py_RETURN_NONE;
}

static PyObject *table_note_uses(PyObject *self, PyObject *args) {
    Table *table = table_of(self);
    Py_buffer source;
    Py_ssize_t first, count;
    if (!PyArg_ParseTuple(args, "y*nn", &source, &first, &count))
        return NULL;
    int fits = first >= 0 && count >= 0 && first + count <= table->capacity && first + count <= source.len / 8;
    if (fits)
        memcpy(table->used_at + first, (const int64_t *)source.buf + first, (size_t)count * 8);
    PyBuffer_Release(&source);
    if (fits)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "these rows are not in the table");
    return NULL;
}

/* Reads a record as a peer does: 1 with its word and its key if it is ready, 0 if it is not, or is just being changed.
 * What another program has written there is no key. */
static int read_record(Record *record, uint64_t *word, unsigned char *key, size_t *size) {
    *word = atomic_load_explicit(&record->word, memory_order_acquire);
    *size = record->key_bytes;
    if (!(*word & 1) || *size < 1 || *size > KEY_BYTES)
        return 0;
    memcpy(key, record->key, *size);
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&record->word, memory_order_relaxed) == *word;
}

/* Parallel lists that a method returns. */
typedef struct {
    PyObject *lists[4];
    int count;
} Lists;

static int lists_open(Lists *lists, int count) {
    lists->count = count;
    for (int i = 0; i < count; i++)
        lists->lists[i] = PyList_New(0);
    for (int i = 0; i < count; i++)
        if (lists->lists[i] == NULL)
            return -1;
    return 0;
}

/* Appends to one of them, and drops the item. 0, or -1 with an exception set, also if the item is NULL. */
static int lists_add(Lists *lists, int at, PyObject *item) {
    int failed = item == NULL ? -1 : PyList_Append(lists->lists[at], item);
    Py_XDECREF(item);
    return failed;
}

/* The tuple of the lists, or NULL if this failed. They are dropped. */
static PyObject *lists_close(Lists *lists, int failed) {
    PyObject *result = failed ? NULL : PyTuple_New(lists->count);
    for (int i = 0; i < lists->count; i++) {
        if (result)
            PyTuple_SetItem(result, i, lists->lists[i]);
        else
            Py_XDECREF(lists->lists[i]);
    }
    return result;
}

/* Appends a record's row, key and word if it is ready, otherwise the row, None and 0, unless `only_ready`. */
static int add_record(Table *table, Lists *lists, Py_ssize_t row, int only_ready) {
    unsigned char key[KEY_BYTES];
    size_t size;
    uint64_t word;
    int is_ready = read_record(&table->records[row], &word, key, &size);
    if (!is_ready && only_ready)
        return 0;
    if (!is_ready)
        Py_INCREF(Py_None);
    return lists_add(lists, 0, PyLong_FromSsize_t(row)) ||
           lists_add(lists, 1, is_ready ? PyBytes_FromStringAndSize((const char *)key, (Py_ssize_t)size) : Py_None) ||
           lists_add(lists, 2, PyLong_FromUnsignedLongLong(is_ready ? word : 0));
}

static PyObject *table_scan(PyObject *self, PyObject *args) {
    Table *table = table_of(self);
    Py_ssize_t first, count;
    if (!PyArg_ParseTuple(args, "nn", &first, &count))
        return NULL;
    Lists lists;
    int failed = lists_open(&lists, 3);
    for (Py_ssize_t row = first; !failed && row < table->capacity && row - first < count; row++)
        failed = add_record(table, &lists, row, 1);
    return lists_close(&lists, failed);
}

/* Touching memory that the file has not any more would end the process. */
static int is_intact(const Table *table) {
    struct stat status;
    return fstat(table->fd, &status) == 0 && status.st_size >= table->size;
}

static PyObject *table_is_intact(PyObject *self, PyObject *unused) {
    return PyBool_FromLong(is_intact(table_of(self)));
}

static PyObject *table_news(PyObject *self, PyObject *args) {
    Table *table = table_of(self);
    unsigned long long epoch, seen;
    if (!PyArg_ParseTuple(args, "KK", &epoch, &seen))
        return NULL;
    if (!is_intact(table))
        Py_RETURN_NONE;
    return PyBool_FromLong(atomic_load_explicit(&table->header->epoch, memory_order_relaxed) != epoch ||
                           atomic_load_explicit(&table->header->changes, memory_order_relaxed) != seen);
}

static PyObject *table_changes_since(PyObject *self, PyObject *args) {
    Table *table = table_of(self);
    Header *header = table->header;
    unsigned long long seen;
    Py_ssize_t limit;
    if (!PyArg_ParseTuple(args, "Kn", &seen, &limit))
        return NULL;
    uint64_t changes = atomic_load_explicit(&header->changes, memory_order_acquire);
    uint64_t end = changes - seen > (uint64_t)limit ? seen + (uint64_t)limit : changes;
    Lists lists;
    int failed = lists_open(&lists, 3);
    for (uint64_t at = seen; !failed && at < end; at++) {
        Py_ssize_t row = atomic_load_explicit(&header->ring[at % RING], memory_order_relaxed);
        failed = add_record(table, &lists, row % table->capacity, 0); /* any row may be read once more */
    }
    PyObject *found = lists_close(&lists, failed);
    atomic_thread_fence(memory_order_acquire);
    int lapped = atomic_load_explicit(&header->changes, memory_order_relaxed) - seen > RING;
    if (found == NULL || !lapped)
        return found;
    Py_DECREF(found); /* some were overwritten while they were read */
    Py_RETURN_NONE;
}

static PyObject *table_stale(PyObject *self, PyObject *args) {
    Table *table = table_of(self);
    PyObject *rows, *words;
    unsigned long long epoch;
    Py_ssize_t row;
    if (!PyArg_ParseTuple(args, "OOK", &rows, &words, &epoch) || check_lists(rows, words))
        return NULL;
    atomic_thread_fence(memory_order_acquire); /* what was copied was read before what is read here */
    int is_reset = !is_intact(table) || atomic_load_explicit(&table->header->epoch, memory_order_relaxed) != epoch;
    PyObject *stale = PyList_New(0);
    for (Py_ssize_t i = 0; stale && i < PyList_Size(rows); i++) {
        Record *record = record_of(table, rows, i, &row);
        uint64_t word = PyLong_AsUnsignedLongLong(PyList_GetItem(words, i));
        if (record == NULL || PyErr_Occurred()) {
            Py_CLEAR(stale);
        } else if (is_reset || atomic_load_explicit(&record->word, memory_order_relaxed) != word) {
            PyObject *at = PyLong_FromSsize_t(i);
            if (at == NULL || PyList_Append(stale, at))
                Py_CLEAR(stale);
            Py_XDECREF(at);
        }
    }
    return stale;
}

static PyObject *table_restore(PyObject *self, PyObject *unused) {
    Table *table = table_of(self);
    uint64_t newest = 0;
    Lists lists;
    int failed = lists_open(&lists, 4);
    for (Py_ssize_t row = 0; !failed && row < table->capacity; row++) {
        Record *record = &table->records[row];
        unsigned char key[KEY_BYTES];
        size_t size;
        uint64_t word;
        int is_ready = read_record(record, &word, key, &size);
        if (word >> 1 > newest)
            newest = word >> 1;
        if (!is_ready) {
            atomic_store_explicit(&record->word, word & ~UINT64_C(1), memory_order_relaxed);
            continue;
        }
        Py_ssize_t parent = record->parent;
        /* A parent has the smaller serial, so there are no circles, whatever the file holds. */
        if (parent < 0 || parent >= table->capacity || record->parent_serial >= word >> 1 ||
            atomic_load_explicit(&table->records[parent].word, memory_order_relaxed) !=
                (record->parent_serial << 1 | 1))
            parent = -1;
        failed = lists_add(&lists, 0, PyLong_FromSsize_t(row)) ||
                 lists_add(&lists, 1, PyBytes_FromStringAndSize((const char *)key, (Py_ssize_t)size)) ||
                 lists_add(&lists, 2, PyLong_FromSsize_t(parent)) ||
                 lists_add(&lists, 3, PyLong_FromLongLong(table->used_at[row]));
    }
    if (atomic_load_explicit(&table->header->serial, memory_order_relaxed) <= newest)
        atomic_store_explicit(&table->header->serial, newest + 1, memory_order_relaxed);
    return lists_close(&lists, failed);
}

static PyObject *table_epoch(PyObject *self, void *unused) {
    return PyLong_FromUnsignedLongLong(atomic_load_explicit(&table_of(self)->header->epoch, memory_order_acquire));
}

static PyObject *table_changes(PyObject *self, void *unused) {
    return PyLong_FromUnsignedLongLong(atomic_load_explicit(&table_of(self)->header->changes, memory_order_acquire));
}

static PyGetSetDef table_getset[] = {
    {"epoch", table_epoch, NULL, "Changes with each reset. Odd: no record counts.", NULL},
    {"changes", table_changes, NULL, "How many changes there were; see changes_since.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef table_methods[] = {
    {"bytes", table_bytes, METH_O | METH_STATIC, "bytes(capacity) -> int\n\nThe size of a table of so many rows."},
    {"fits", table_fits, METH_O,
     "fits(keys) -> bool\n\nWhether all keys of a list are bytes of a length that a record has room for."},
    {"take", table_take, METH_VARARGS,
     "take(rows, keys, above)\n\nBefore their bytes change: rows will hold keys, lists of one length, and are not "
     "ready. Each\nblock continues the one before it, the first the one in row above, unless that is -1. ValueError, "
     "and\nnothing is changed, for a key or row that cannot be."},
    {"publish", table_publish, METH_O, "publish(rows)\n\nAll bytes of these rows have arrived."},
    {"withdraw", table_withdraw, METH_O, "withdraw(rows)\n\nThese rows are not ready any more."},
    {"begin_reset", table_begin_reset, METH_NOARGS, "begin_reset()\n\nFrom now on no record counts. Takes no time."},
    {"end_reset", table_end_reset, METH_NOARGS, "end_reset()\n\nEmpty the table; records count again."},
    {"note_uses", table_note_uses, METH_VARARGS,
     "note_uses(used_at, first, count)\n\nCopy so many items of an array of int64 by row, from row first on."},
    {"scan", table_scan, METH_VARARGS,
     "scan(first, count) -> (rows, keys, words)\n\nThe ready ones of so many records, as lists. words: for stale()."},
    {"news", table_news, METH_VARARGS,
     "news(epoch, seen) -> bool or None\n\nWhether the epoch or the count of changes is another one. None if not "
     "is_intact()."},
    {"is_intact", table_is_intact, METH_NOARGS,
     "is_intact() -> bool\n\nWhether the file still has its size. If not, no memory of it may be touched."},
    {"changes_since", table_changes_since, METH_VARARGS,
     "changes_since(seen, limit) -> (rows, keys, words) or None\n\nThe present state of the rows that changed after "
     "the "
     "first `seen` changes, at most `limit` of them, oldest first.\nA key of None: the row is not ready. None if there "
     "were more changes than a table remembers."},
    {"stale", table_stale, METH_VARARGS,
     "stale(rows, words, epoch) -> [int]\n\nThe positions of those rows whose word, or the table's epoch, is another "
     "by now; of all if not is_intact()."},
    {"restore", table_restore, METH_NOARGS,
     "restore() -> (rows, keys, parents, used_at)\n\nFor a new owner: the ready blocks, the row of the block that each "
     "one continues (or -1), and its last\nuse in us of CLOCK_MONOTONIC. All other rows are empty from now on."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot table_slots[] = {
    {Py_tp_new, table_new},
    {Py_tp_dealloc, table_dealloc},
    {Py_tp_getset, table_getset},
    {Py_tp_methods, table_methods},
    {Py_tp_doc,
     "Table(address, capacity, fd, size)\n\nThe table of a pool: of so many rows, in a file of this size, which "
     "its user keeps open and mapped at the\naddress. See table.c."},
    {0, NULL},
};
static PyType_Spec table_spec = {"async_tier.streams._native.Table", sizeof(Table), 0, Py_TPFLAGS_DEFAULT, table_slots};

int table_add(PyObject *module) {
    PyObject *type = PyType_FromSpec(&table_spec);
    int failed = type == NULL ? -1 : PyModule_AddObjectRef(module, "Table", type);
    Py_XDECREF(type);
    if (failed == 0)
        failed = PyModule_AddIntConstant(module, "TABLE_KEY_BYTES", KEY_BYTES);
    return failed;
}
