// libcuda.so.1: the driver API, as far as torch, vLLM and a caller of plain streams and copies need it.
#include "engine.h"

#include <cstdio>
#include <cstring>
#include <iterator>

#include <cuda.h>
#include <dlfcn.h>

using namespace cuda_emulator;

static_assert(sizeof(BatchAttributes) == sizeof(CUmemcpyAttributes));

#define EXPORT extern "C" __attribute__((visibility("default"))) CUresult

// The first line of an API function. `name` is what count() and inject() know the call by.
#define ENTER_WITHOUT_CONTEXT(name) \
    if (int error = begin(name)) return static_cast<CUresult>(error)
#define ENTER(name)              \
    ENTER_WITHOUT_CONTEXT(name); \
    if (!has_context()) return CUDA_ERROR_INVALID_CONTEXT
// For functions that go on working after an error, and that nobody counts.
#define ENTER_UNCOUNTED \
    if (!is_initialized()) return CUDA_ERROR_NOT_INITIALIZED
// For functions that do not even need cuInit.
#define ENTER_UNINITIALIZED \
    if (is_forked()) return CUDA_ERROR_NOT_INITIALIZED

namespace cuda_emulator {

static const ErrorText ERRORS[] = {
    {0, "CUDA_SUCCESS", "cudaSuccess", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "cudaErrorInvalidValue", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "cudaErrorInitializationError", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "cudaErrorCudartUnloading", "driver shutting down"},
    {100, "CUDA_ERROR_NO_DEVICE", "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "cudaErrorInvalidDevice", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "cudaErrorDeviceUninitialized", "invalid device context"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
    {304, "CUDA_ERROR_OPERATING_SYSTEM", "cudaErrorOperatingSystem", "OS call failed or not supported on this OS"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {401, "CUDA_ERROR_ILLEGAL_STATE", "cudaErrorIllegalState",
     "the operation cannot be performed in the present state"},
    {500, "CUDA_ERROR_NOT_FOUND", "cudaErrorSymbolNotFound", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "cudaErrorNotReady", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "cudaErrorLaunchFailure", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "cudaErrorNotPermitted", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "cudaErrorNotSupported", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {999, "CUDA_ERROR_UNKNOWN", "cudaErrorUnknown", "unknown error"},
};

const ErrorText *error_text(int code) {
    for (const ErrorText &error : ERRORS)
        if (error.code == code) return &error;
    return nullptr;
}

// Those of an H100, where anybody asked so far.
int device_attribute(const Lock &, int attribute) {
    auto set = state.settings.attributes.find(attribute);
    if (set != state.settings.attributes.end()) return set->second;
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y: return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 << 10;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return 227 << 10;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 228 << 10;
        case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 64 << 10;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return 64 << 10;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 64 << 10;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1500000;  // kHz
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
        case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return ENGINES;
        case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: return 1;
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS: return 1;
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: return 1;
        case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: return 1;
        case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: return 1;
        case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED: return 1;
        default: return 0;
    }
}

int device_attribute(int attribute) {
    Lock lock(state.mutex);
    return device_attribute(lock, attribute);
}

}  // namespace cuda_emulator

// ------------------------------------------------------------------------------------------------------------ details

static CUresult result(int code) { return static_cast<CUresult>(code); }
static StreamHandle handle(CUstream stream) { return StreamHandle{reinterpret_cast<uintptr_t>(stream)}; }
static EventHandle handle(CUevent event) { return EventHandle{reinterpret_cast<uintptr_t>(event)}; }
static void *pointer(CUdeviceptr address) { return reinterpret_cast<void *>(address); }

// A context's handle is its device's number, told apart from other pointers.
static constexpr uintptr_t FIRST_CONTEXT = 0xC0DE0000;
static constexpr uintptr_t CONTEXT_STEP = 0x10;

static CUcontext context_of(int device) {
    return reinterpret_cast<CUcontext>(FIRST_CONTEXT + static_cast<uintptr_t>(device) * CONTEXT_STEP);
}

static int device_of(CUcontext context) {  // below zero: no context of ours
    uintptr_t distance = reinterpret_cast<uintptr_t>(context) - FIRST_CONTEXT;
    uintptr_t device = distance / CONTEXT_STEP;
    return distance % CONTEXT_STEP == 0 && device < static_cast<uintptr_t>(device_count()) ? static_cast<int>(device)
                                                                                           : -1;
}

static bool is_device(int device) { return device >= 0 && device < device_count(); }

static CUresult create(CUstream *stream, unsigned flags, int priority) {
    StreamHandle created{};
    int error = create_stream(flags, priority, &created);
    if (!error) *stream = reinterpret_cast<CUstream>(created);
    return result(error);
}

static CUresult copy_one(CUdeviceptr to, CUdeviceptr from, size_t bytes, Kind kind, CUstream stream, bool blocking) {
    return result(copy({pointer(to), pointer(from), bytes}, kind, handle(stream), blocking));
}

// --------------------------------------------------------------------------------------------------- devices, contexts

EXPORT cuInit(unsigned) { return result(initialize()); }

EXPORT cuDriverGetVersion(int *version) {
    *version = DRIVER_VERSION;
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGetCount(int *count) {
    ENTER_WITHOUT_CONTEXT("device_get_count");
    *count = device_count();
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER_WITHOUT_CONTEXT("device_get");
    if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGetName(char *name, int size, CUdevice) {
    ENTER_UNCOUNTED;
    snprintf(name, static_cast<size_t>(size), "Emulated CUDA device");
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    ENTER_UNCOUNTED;
    memset(uuid, 0xE0 + device, sizeof *uuid);
    return CUDA_SUCCESS;
}

EXPORT cuDeviceTotalMem_v2(size_t *bytes, CUdevice) {
    ENTER_UNCOUNTED;
    *bytes = total_memory();
    return CUDA_SUCCESS;
}

EXPORT cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    ENTER_UNCOUNTED;
    *value = device_attribute(attribute);
    return CUDA_SUCCESS;
}

EXPORT cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER_WITHOUT_CONTEXT("primary_context_retain");
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    retain_context(device);
    *context = context_of(device);
    return CUDA_SUCCESS;
}

EXPORT cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER_WITHOUT_CONTEXT("primary_context_release");
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    return result(release_context(device));
}

EXPORT cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    ENTER_UNCOUNTED;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (flags) *flags = 0;
    if (active) *active = is_context_active(device);
    return CUDA_SUCCESS;
}

EXPORT cuCtxGetCurrent(CUcontext *context) {
    ENTER_UNCOUNTED;
    *context = has_context() ? context_of(current_device()) : nullptr;
    return CUDA_SUCCESS;
}

// Replaces the top of the thread's stack; null takes it away.
EXPORT cuCtxSetCurrent(CUcontext context) {
    ENTER_UNCOUNTED;
    if (!context) clear_context();
    else if (set_device(device_of(context))) return CUDA_ERROR_INVALID_CONTEXT;
    return CUDA_SUCCESS;
}

EXPORT cuCtxPushCurrent_v2(CUcontext context) {
    ENTER_UNCOUNTED;
    return result(push_context(device_of(context)));
}

EXPORT cuCtxPopCurrent_v2(CUcontext *context) {
    ENTER_UNCOUNTED;
    int device;
    if (int error = pop_context(&device)) return result(error);
    if (context) *context = context_of(device);
    return CUDA_SUCCESS;
}

EXPORT cuCtxGetDevice(CUdevice *device) {
    ENTER("context_get_device");
    *device = current_device();
    return CUDA_SUCCESS;
}

EXPORT cuCtxSynchronize(void) {
    ENTER("device_sync");
    return result(synchronize_device());
}

EXPORT cuCtxGetStreamPriorityRange(int *lowest, int *highest) {
    ENTER("stream_priority_range");
    if (lowest) *lowest = LOWEST_PRIORITY;
    if (highest) *highest = HIGHEST_PRIORITY;
    return CUDA_SUCCESS;
}

// ------------------------------------------------------------------------------------------------------------- memory

EXPORT cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    ENTER("malloc");
    void *allocated = nullptr;
    int error = allocate(bytes, &allocated);
    if (!error) *address = reinterpret_cast<CUdeviceptr>(allocated);
    return result(error);
}

EXPORT cuMemFree_v2(CUdeviceptr address) {
    ENTER("free");
    if (!address) return CUDA_SUCCESS;
    synchronize_device();
    return result(release(pointer(address)));
}

EXPORT cuMemGetInfo_v2(size_t *free, size_t *total) {
    ENTER("mem_get_info");
    *free = free_memory(current_device());
    *total = total_memory();
    return CUDA_SUCCESS;
}

EXPORT cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    ENTER("mem_get_address_range");
    void *start;
    if (!find_allocation(pointer(address), &start, bytes, nullptr)) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = reinterpret_cast<CUdeviceptr>(start);
    return CUDA_SUCCESS;
}

EXPORT cuMemHostAlloc(void **address, size_t bytes, unsigned) {
    ENTER("host_alloc");
    return result(allocate_host(bytes, address));
}

EXPORT cuMemAllocHost_v2(void **address, size_t bytes) {
    ENTER("host_alloc");
    return result(allocate_host(bytes, address));
}

EXPORT cuMemFreeHost(void *address) {
    ENTER("host_free");
    return result(free_host(address));
}

EXPORT cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
    ENTER("host_register");
    return result(register_host(address, bytes, flags));
}

EXPORT cuMemHostUnregister(void *address) {
    ENTER("host_unregister");
    return result(unregister_host(address));
}

EXPORT cuMemHostGetDevicePointer_v2(CUdeviceptr *device_pointer, void *address, unsigned) {
    ENTER("host_get_device_pointer");
    if (!find_pinned(address, nullptr, nullptr)) return CUDA_ERROR_INVALID_VALUE;
    *device_pointer = reinterpret_cast<CUdeviceptr>(address);
    return CUDA_SUCCESS;
}

// How many bytes an attribute's value has; 0: not emulated.
static size_t width_of(CUpointer_attribute attribute) {
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_CONTEXT:
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
        case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        case CU_POINTER_ATTRIBUTE_RANGE_SIZE: return 8;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        case CU_POINTER_ATTRIBUTE_IS_MANAGED: return 4;
        default: return 0;
    }
}

static CUresult get_attribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    size_t width = width_of(attribute);
    if (!width) {
        refuse("this attribute of a pointer");
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    void *base;
    size_t bytes;
    int device = 0;
    bool on_device = find_allocation(pointer(address), &base, &bytes, &device);
    if (!on_device && !find_pinned(pointer(address), &base, &bytes)) return CUDA_ERROR_INVALID_VALUE;
    uint64_t answer = 0;
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_CONTEXT: answer = reinterpret_cast<uintptr_t>(context_of(device)); break;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: answer = on_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST; break;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: answer = address; break;
        case CU_POINTER_ATTRIBUTE_HOST_POINTER:
            if (on_device) return CUDA_ERROR_INVALID_VALUE;
            answer = address;
            break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: answer = static_cast<uint64_t>(device); break;
        case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: answer = reinterpret_cast<uintptr_t>(base); break;
        case CU_POINTER_ATTRIBUTE_RANGE_SIZE: answer = bytes; break;
        default: break;  // IS_MANAGED
    }
    memcpy(value, &answer, width);
    return CUDA_SUCCESS;
}

EXPORT cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    ENTER_WITHOUT_CONTEXT("pointer_get_attribute");
    return get_attribute(value, attribute, address);
}

// Unlike the one above it succeeds for any address, and answers zero for what there is not.
EXPORT cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values, CUdeviceptr address) {
    ENTER_WITHOUT_CONTEXT("pointer_get_attributes");
    for (unsigned i = 0; i < count; i++) {
        CUresult error = get_attribute(values[i], attributes[i], address);
        if (error == CUDA_ERROR_NOT_SUPPORTED) return error;
        if (error) memset(values[i], 0, width_of(attributes[i]));
    }
    return CUDA_SUCCESS;
}

// ------------------------------------------------------------------------------------------------------------- copies

EXPORT cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    ENTER("memcpy");
    return copy_one(to, from, bytes, ANY_KIND, nullptr, true);
}

EXPORT cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    ENTER("memcpy");
    return copy_one(to, reinterpret_cast<CUdeviceptr>(from), bytes, H2D, nullptr, true);
}

EXPORT cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    ENTER("memcpy");
    return copy_one(reinterpret_cast<CUdeviceptr>(to), from, bytes, D2H, nullptr, true);
}

EXPORT cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER("memcpy_async");
    return copy_one(to, from, bytes, ANY_KIND, stream, false);
}

EXPORT cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    ENTER("memcpy_async");
    return copy_one(to, reinterpret_cast<CUdeviceptr>(from), bytes, H2D, stream, false);
}

EXPORT cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER("memcpy_async");
    return copy_one(reinterpret_cast<CUdeviceptr>(to), from, bytes, D2H, stream, false);
}

EXPORT cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER("memcpy_async");
    return copy_one(to, from, bytes, D2D, stream, false);
}

EXPORT cuMemcpyBatchAsync_v2(CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t count,
                             CUmemcpyAttributes *attributes, size_t *attributes_from, size_t attribute_count,
                             CUstream stream) {
    ENTER("memcpy_batch_async");
    return result(copy_batch(reinterpret_cast<void **>(to), reinterpret_cast<const void **>(from), sizes, count,
                             reinterpret_cast<BatchAttributes *>(attributes), attributes_from, attribute_count,
                             handle(stream)));
}

// The first form of it, which CUDA 13 still has but does not declare: it also says which entry was at fault. -1: none.
static CUresult copy_batch_12080(CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t count,
                                 CUmemcpyAttributes *attributes, size_t *attributes_from, size_t attribute_count,
                                 size_t *failed, CUstream stream) {
    if (failed) *failed = static_cast<size_t>(-1);
    return cuMemcpyBatchAsync_v2(to, from, sizes, count, attributes, attributes_from, attribute_count, stream);
}

EXPORT cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, CUstream stream) {
    ENTER("memset_async");
    return result(fill(pointer(address), value, sizeof value, count, handle(stream)));
}

EXPORT cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream stream) {
    ENTER("memset_async");
    return result(fill(pointer(address), value, sizeof value, count, handle(stream)));
}

EXPORT cuMemsetD8_v2(CUdeviceptr address, unsigned char value, size_t count) {
    ENTER("memset_async");
    return result(fill(pointer(address), value, sizeof value, count, LEGACY_STREAM));
}

// ----------------------------------------------------------------------------------------------------- streams, events

EXPORT cuStreamCreate(CUstream *stream, unsigned flags) {
    ENTER("stream_create");
    return create(stream, flags, LOWEST_PRIORITY);
}

EXPORT cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    ENTER("stream_create");
    return create(stream, flags, priority);
}

EXPORT cuStreamDestroy_v2(CUstream stream) {
    ENTER("stream_destroy");
    return result(destroy_stream(handle(stream)));
}

EXPORT cuStreamQuery(CUstream stream) {
    ENTER("stream_query");
    return result(query_stream(handle(stream)));
}

EXPORT cuStreamSynchronize(CUstream stream) {
    ENTER("stream_sync");
    return result(synchronize_stream(handle(stream)));
}

EXPORT cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
    ENTER("stream_wait_event");
    return result(wait_event(handle(stream), handle(event)));
}

EXPORT cuStreamGetPriority(CUstream stream, int *priority) {
    ENTER("stream_get_priority");
    return result(describe_stream(handle(stream), nullptr, priority, nullptr));
}

EXPORT cuStreamGetFlags(CUstream stream, unsigned *flags) {
    ENTER("stream_get_flags");
    return result(describe_stream(handle(stream), flags, nullptr, nullptr));
}

EXPORT cuStreamGetCtx(CUstream stream, CUcontext *context) {
    ENTER("stream_get_context");
    int device;
    if (int error = describe_stream(handle(stream), nullptr, nullptr, &device)) return result(error);
    *context = context_of(device);
    return CUDA_SUCCESS;
}

EXPORT cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
    ENTER("stream_begin_capture");
    return result(begin_capture(handle(stream), mode));
}

EXPORT cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    ENTER("stream_end_capture");
    uintptr_t captured;
    int error = end_capture(handle(stream), &captured);
    *graph = reinterpret_cast<CUgraph>(captured);
    return result(error);
}

EXPORT cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    ENTER_UNCOUNTED;
    *status = static_cast<CUstreamCaptureStatus>(capture_status(handle(stream)));
    return CUDA_SUCCESS;
}

EXPORT cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    ENTER_UNCOUNTED;
    int exchanged = *mode;
    int error = exchange_capture_mode(&exchanged);
    *mode = static_cast<CUstreamCaptureMode>(exchanged);
    return result(error);
}

EXPORT cuGraphDestroy(CUgraph) {
    ENTER("graph_destroy");
    return CUDA_SUCCESS;
}

EXPORT cuEventCreate(CUevent *event, unsigned flags) {
    ENTER("event_create");
    EventHandle created{};
    int error = create_event(flags, &created);
    if (!error) *event = reinterpret_cast<CUevent>(created);
    return result(error);
}

EXPORT cuEventDestroy_v2(CUevent event) {
    ENTER("event_destroy");
    return result(destroy_event(handle(event)));
}

EXPORT cuEventRecord(CUevent event, CUstream stream) {
    ENTER("event_record");
    return result(record_event(handle(event), handle(stream)));
}

EXPORT cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned) {
    ENTER("event_record");
    return result(record_event(handle(event), handle(stream)));
}

EXPORT cuEventQuery(CUevent event) {
    ENTER("event_query");
    return result(query_event(handle(event)));
}

EXPORT cuEventSynchronize(CUevent event) {
    ENTER("event_sync");
    return result(synchronize_event(handle(event)));
}

EXPORT cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end) {
    ENTER("event_elapsed");
    return result(elapsed_time(handle(start), handle(end), milliseconds));
}

EXPORT cuLaunchHostFunc(CUstream stream, CUhostFn function, void *argument) {
    ENTER("launch_host_func");
    return result(call_host(handle(stream), function, argument));
}

// ----------------------------------------------------------------------------------------------------- errors, lookup

EXPORT cuGetErrorString(CUresult code, const char **text) {
    const ErrorText *error = error_text(code);
    *text = error ? error->text : nullptr;
    return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT cuGetErrorName(CUresult code, const char **name) {
    const ErrorText *error = error_text(code);
    *name = error ? error->driver_name : nullptr;
    return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// torch registers one as soon as it starts. There is never anything to log.
EXPORT cuLogsRegisterCallback(CUlogsCallback, void *, CUlogsCallbackHandle *registered) {
    ENTER_UNINITIALIZED;
    if (registered) *registered = nullptr;
    return CUDA_SUCCESS;
}

EXPORT cuLogsUnregisterCallback(CUlogsCallbackHandle) {
    ENTER_UNINITIALIZED;
    return CUDA_SUCCESS;
}

EXPORT cuGetExportTable(const void **table, const CUuuid *) {
    ENTER_UNINITIALIZED;
    if (table) *table = nullptr;
    return CUDA_ERROR_NOT_FOUND;
}

static constexpr int FIRST_WITH_BATCH = 12080;
static constexpr int FIRST_WITHOUT_FAILED_INDEX = 13000;

// A function of this library by its exact name. dlsym alone would search the libraries that this one needs, too.
static void *own_function(const std::string &name) {
    Dl_info own, found;
    dladdr(reinterpret_cast<void *>(&cuInit), &own);
    static void *library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    void *function = dlsym(library, name.c_str());
    return function && dladdr(function, &found) && !strcmp(own.dli_fname, found.dli_fname) ? function : nullptr;
}

static void *function_of_version(const std::string &name, int version) {
    if (is_hidden(name.c_str())) return nullptr;
    if (name == "cuMemcpyBatchAsync" && version < FIRST_WITHOUT_FAILED_INDEX)
        return version < FIRST_WITH_BATCH ? nullptr : reinterpret_cast<void *>(&copy_batch_12080);
    for (const char *suffix : {"_v4", "_v3", "_v2", ""})
        if (void *function = own_function(name + suffix)) return function;
    return nullptr;
}

// What there is not, or not in that version, is no error.
EXPORT cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t,
                           CUdriverProcAddressQueryResult *status) {
    ENTER_UNINITIALIZED;
    *function = nullptr;
    if (version > DRIVER_VERSION) return CUDA_ERROR_INVALID_VALUE;
    *function = function_of_version(name, version);
    if (status)
        *status = *function                                   ? CU_GET_PROC_ADDRESS_SUCCESS
                  : function_of_version(name, DRIVER_VERSION) ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                                                              : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_SUCCESS;
}

#undef cuGetProcAddress
EXPORT cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}

#undef cuEventElapsedTime  // the one that drivers before 12.8 have, too
EXPORT cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}
