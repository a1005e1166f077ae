/* `_native.Table`: see table.c. */
#ifndef ASYNC_TIER_TABLE_H
#define ASYNC_TIER_TABLE_H

#include <Python.h>

/* Adds the type to the module. 0, or -1 with an exception set. */
int table_add(PyObject *module);

#endif
