// libcudart.so.13: the runtime API over the engine. Other than the driver API it has an implicit context on each
// thread, and a "last error" that a thread keeps until somebody asks for it.
#include "engine.h"

#include <cstdio>
#include <cstring>
#include <ctime>
#include <unordered_map>

#include <cuda_runtime_api.h>

using namespace cuda_emulator;

static_assert(sizeof(BatchAttributes) == sizeof(cudaMemcpyAttributes));

#define EXPORT_AS(type) extern "C" __attribute__((visibility("default"))) type CUDARTAPI
#define EXPORT EXPORT_AS(cudaError_t)

// The first line of an API function. `name` is what count() and inject() know the call by.
#define ENTER(name) \
    if (int error = enter(name)) return result(error)
// For what asks about devices, and sets no context up.
#define ENTER_WITHOUT_CONTEXT(name) \
    if (int error = enter_without_context(name)) return result(error)
// For functions that go on working after an error, and that nobody counts.
#define ENTER_UNCOUNTED \
    if (is_forked()) return result(NOT_INITIALIZED)

extern "C" int cuGetProcAddress_v2(const char *, void **, int, unsigned long long, int *);

static thread_local int last_error = SUCCESS;

static cudaError_t result(int code) {
    if (code) last_error = code;
    return static_cast<cudaError_t>(code);
}

// Of a query: 600 is an answer and no error, and does not become the last one.
static cudaError_t answer(int code) { return code == NOT_READY ? cudaErrorNotReady : result(code); }

static int enter_without_context(const char *api) {
    if (int error = initialize()) return error;
    return begin(api);
}

static int enter(const char *api) {
    if (int error = initialize()) return error;
    use_context();
    return begin(api);
}

static StreamHandle handle(cudaStream_t stream) { return StreamHandle{reinterpret_cast<uintptr_t>(stream)}; }
static EventHandle handle(cudaEvent_t event) { return EventHandle{reinterpret_cast<uintptr_t>(event)}; }

// Called by the generated stubs.
extern "C" __attribute__((visibility("default"))) int cudaemu_runtime_refuse(const char *name) {
    if (is_forked()) return result(NOT_INITIALIZED);
    refuse(name);
    return result(NOT_SUPPORTED);
}

// ----------------------------------------------------------------------------------------------------- errors, devices

EXPORT cudaGetLastError(void) {
    int sticky = sticky_error();
    int code = sticky ? sticky : last_error;
    last_error = SUCCESS;
    return static_cast<cudaError_t>(code);
}

EXPORT cudaPeekAtLastError(void) {
    int sticky = sticky_error();
    return static_cast<cudaError_t>(sticky ? sticky : last_error);
}

EXPORT_AS(const char *) cudaGetErrorName(cudaError_t code) {
    const ErrorText *error = error_text(code);
    return error ? error->runtime_name : "unrecognized error code";
}

EXPORT_AS(const char *) cudaGetErrorString(cudaError_t code) {
    const ErrorText *error = error_text(code);
    return error ? error->text : "unrecognized error code";
}

EXPORT cudaDriverGetVersion(int *version) {
    *version = DRIVER_VERSION;
    return cudaSuccess;
}

EXPORT cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

EXPORT cudaGetDeviceCount(int *count) {
    ENTER_WITHOUT_CONTEXT("device_get_count");
    *count = device_count();
    return cudaSuccess;
}

EXPORT cudaGetDevice(int *device) {
    ENTER_WITHOUT_CONTEXT("get_device");
    *device = current_device();
    return cudaSuccess;
}

EXPORT cudaSetDevice(int device) {
    ENTER_WITHOUT_CONTEXT("set_device");
    if (int error = set_device(device)) return result(error);
    use_context();
    return cudaSuccess;
}

EXPORT cudaDeviceSynchronize(void) {
    ENTER("device_sync");
    return result(synchronize_device());
}

EXPORT cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    ENTER_UNCOUNTED;
    *value = device_attribute(attribute);
    return cudaSuccess;
}

EXPORT cudaDeviceGetStreamPriorityRange(int *lowest, int *highest) {
    ENTER_UNCOUNTED;
    if (lowest) *lowest = LOWEST_PRIORITY;
    if (highest) *highest = HIGHEST_PRIORITY;
    return cudaSuccess;
}

EXPORT cudaDeviceGetPCIBusId(char *id, int size, int device) {
    ENTER_UNCOUNTED;
    snprintf(id, static_cast<size_t>(size), "0000:%02X:00.0", device + 1);
    return cudaSuccess;
}

EXPORT cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    ENTER_UNCOUNTED;
    *can = device != peer;
    return cudaSuccess;
}

EXPORT cudaDeviceEnablePeerAccess(int, unsigned) {
    ENTER_UNCOUNTED;
    return cudaSuccess;
}

EXPORT cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
    ENTER_WITHOUT_CONTEXT("get_device_properties");
    if (device < 0 || device >= device_count()) return result(INVALID_DEVICE);
    auto attribute = [](cudaDeviceAttr which) { return device_attribute(which); };
    cudaDeviceProp &p = *properties;
    p = {};
    snprintf(p.name, sizeof p.name, "Emulated CUDA device");
    memset(&p.uuid, 0xE0 + device, sizeof p.uuid);
    p.totalGlobalMem = total_memory();
    p.pciBusID = device + 1;
    p.l2CacheSize = 50 << 20;
    p.major = attribute(cudaDevAttrComputeCapabilityMajor);
    p.minor = attribute(cudaDevAttrComputeCapabilityMinor);
    p.multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p.warpSize = attribute(cudaDevAttrWarpSize);
    p.maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
    p.maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    p.maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    p.maxThreadsDim[0] = attribute(cudaDevAttrMaxBlockDimX);
    p.maxThreadsDim[1] = attribute(cudaDevAttrMaxBlockDimY);
    p.maxThreadsDim[2] = attribute(cudaDevAttrMaxBlockDimZ);
    p.maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
    p.maxGridSize[1] = attribute(cudaDevAttrMaxGridDimY);
    p.maxGridSize[2] = attribute(cudaDevAttrMaxGridDimZ);
    p.sharedMemPerBlock = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlock));
    p.sharedMemPerBlockOptin = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    p.sharedMemPerMultiprocessor = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
    p.totalConstMem = static_cast<size_t>(attribute(cudaDevAttrTotalConstantMemory));
    p.regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
    p.regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    p.asyncEngineCount = attribute(cudaDevAttrAsyncEngineCount);
    p.canMapHostMemory = p.concurrentKernels = p.unifiedAddressing = 1;
    p.streamPrioritiesSupported = p.hostRegisterSupported = p.cooperativeLaunch = 1;
    return cudaSuccess;
}

EXPORT cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                        cudaDriverEntryPointQueryResult *status) {
    ENTER_WITHOUT_CONTEXT("get_driver_entry_point");
    int found = 0;
    cuGetProcAddress_v2(name, function, static_cast<int>(version), flags, &found);
    if (status) *status = static_cast<cudaDriverEntryPointQueryResult>(found);
    return cudaSuccess;
}

EXPORT cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                               cudaDriverEntryPointQueryResult *status) {
    return cudaGetDriverEntryPointByVersion(name, function, CUDART_VERSION, flags, status);
}

EXPORT cudaProfilerStart(void) {
    ENTER_UNCOUNTED;
    return cudaSuccess;
}

EXPORT cudaProfilerStop(void) {
    ENTER_UNCOUNTED;
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------------- memory

EXPORT cudaMalloc(void **pointer, size_t bytes) {
    ENTER("malloc");
    *pointer = nullptr;
    return bytes ? result(allocate(bytes, pointer)) : cudaSuccess;
}

EXPORT cudaFree(void *pointer) {
    ENTER("free");
    if (!pointer) return cudaSuccess;
    synchronize_device();
    return result(release(pointer));
}

EXPORT cudaMemGetInfo(size_t *free, size_t *total) {
    ENTER("mem_get_info");
    *free = free_memory(current_device());
    *total = total_memory();
    return cudaSuccess;
}

EXPORT cudaHostAlloc(void **pointer, size_t bytes, unsigned) {
    ENTER("host_alloc");
    return result(allocate_host(bytes, pointer));
}

EXPORT cudaMallocHost(void **pointer, size_t bytes) {
    ENTER("host_alloc");
    return result(allocate_host(bytes, pointer));
}

EXPORT cudaFreeHost(void *pointer) {
    ENTER("host_free");
    return result(free_host(pointer));
}

EXPORT cudaHostRegister(void *pointer, size_t bytes, unsigned flags) {
    ENTER("host_register");
    return result(register_host(pointer, bytes, flags));
}

EXPORT cudaHostUnregister(void *pointer) {
    ENTER("host_unregister");
    return result(unregister_host(pointer));
}

EXPORT cudaHostGetDevicePointer(void **device_pointer, void *pointer, unsigned) {
    ENTER("host_get_device_pointer");
    if (!find_pinned(pointer, nullptr, nullptr)) return result(INVALID_VALUE);
    *device_pointer = pointer;
    return cudaSuccess;
}

EXPORT cudaHostGetFlags(unsigned *flags, void *pointer) {
    ENTER("host_get_flags");
    if (!find_pinned(pointer, nullptr, nullptr)) return result(INVALID_VALUE);
    *flags = cudaHostAllocPortable | cudaHostAllocMapped;
    return cudaSuccess;
}

EXPORT cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
    ENTER("pointer_get_attributes");
    constexpr int NO_DEVICE = -2;
    void *address = const_cast<void *>(pointer);
    *attributes = {};
    int device;
    if (find_allocation(pointer, nullptr, nullptr, &device)) {
        attributes->type = cudaMemoryTypeDevice;
        attributes->device = device;
        attributes->devicePointer = address;
    } else if (find_pinned(pointer, nullptr, nullptr)) {
        attributes->type = cudaMemoryTypeHost;
        attributes->device = 0;
        attributes->devicePointer = address;
        attributes->hostPointer = address;
    } else {
        attributes->type = cudaMemoryTypeUnregistered;
        attributes->device = NO_DEVICE;
        attributes->hostPointer = address;
    }
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------------- copies

static Kind kind_of(cudaMemcpyKind kind) {
    switch (kind) {
        case cudaMemcpyHostToHost: return H2H;
        case cudaMemcpyHostToDevice: return H2D;
        case cudaMemcpyDeviceToHost: return D2H;
        case cudaMemcpyDeviceToDevice: return D2D;
        default: return ANY_KIND;
    }
}

static bool is_kind(cudaMemcpyKind kind) { return kind >= cudaMemcpyHostToHost && kind <= cudaMemcpyDefault; }

EXPORT cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    ENTER("memcpy");
    if (!is_kind(kind)) return result(cudaErrorInvalidMemcpyDirection);
    return result(copy({to, from, bytes}, kind_of(kind), LEGACY_STREAM, true));
}

EXPORT cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    ENTER("memcpy_async");
    if (!is_kind(kind)) return result(cudaErrorInvalidMemcpyDirection);
    return result(copy({to, from, bytes}, kind_of(kind), handle(stream), false));
}

EXPORT cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t stream) {
    ENTER("memcpy_async");
    return result(copy({to, from, bytes}, D2D, handle(stream), false));
}

EXPORT cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind, cudaStream_t stream) {
    ENTER("memcpy_async");
    if (!is_kind(kind)) return result(cudaErrorInvalidMemcpyDirection);
    if (width > to_pitch || width > from_pitch) return result(cudaErrorInvalidPitchValue);
    std::vector<CopyRequest> rows;
    auto *row_to = static_cast<char *>(to);
    auto *row_from = static_cast<const char *>(from);
    for (size_t i = 0; i < height && width; i++)
        rows.push_back({row_to + i * to_pitch, row_from + i * from_pitch, width});
    return result(copy_rows(rows, kind_of(kind), handle(stream)));
}

EXPORT cudaMemcpyBatchAsync(void *const *to, const void *const *from, const size_t *sizes, size_t count,
                            cudaMemcpyAttributes *attributes, size_t *attributes_from, size_t attribute_count,
                            cudaStream_t stream) {
    ENTER("memcpy_batch_async");
    return result(copy_batch(to, from, sizes, count, reinterpret_cast<BatchAttributes *>(attributes), attributes_from,
                             attribute_count, handle(stream)));
}

EXPORT cudaMemset(void *pointer, int value, size_t bytes) {
    ENTER("memset_async");
    return result(fill(pointer, static_cast<uint8_t>(value), 1, bytes, LEGACY_STREAM));
}

EXPORT cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) {
    ENTER("memset_async");
    return result(fill(pointer, static_cast<uint8_t>(value), 1, bytes, handle(stream)));
}

// ----------------------------------------------------------------------------------------------------- streams, events

static cudaError_t create(cudaStream_t *stream, unsigned flags, int priority) {
    ENTER("stream_create");
    StreamHandle created{};
    int error = create_stream(flags, priority, &created);
    if (!error) *stream = reinterpret_cast<cudaStream_t>(created);
    return result(error);
}

EXPORT cudaStreamCreate(cudaStream_t *stream) { return create(stream, 0, LOWEST_PRIORITY); }

EXPORT cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return create(stream, flags, LOWEST_PRIORITY);
}

EXPORT cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return create(stream, flags, priority);
}

EXPORT cudaStreamDestroy(cudaStream_t stream) {
    ENTER("stream_destroy");
    return result(destroy_stream(handle(stream)));
}

// NOT_READY becomes the thread's last error as well; torch clears it.
EXPORT cudaStreamQuery(cudaStream_t stream) {
    ENTER("stream_query");
    return answer(query_stream(handle(stream)));
}

EXPORT cudaStreamSynchronize(cudaStream_t stream) {
    ENTER("stream_sync");
    return result(synchronize_stream(handle(stream)));
}

EXPORT cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    ENTER("stream_wait_event");
    return result(wait_event(handle(stream), handle(event)));
}

EXPORT cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    ENTER("stream_get_priority");
    return result(describe_stream(handle(stream), nullptr, priority, nullptr));
}

EXPORT cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) {
    ENTER("stream_get_flags");
    return result(describe_stream(handle(stream), flags, nullptr, nullptr));
}

EXPORT cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    ENTER_UNCOUNTED;
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

EXPORT cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *id,
                                cudaGraph_t *graph, const cudaGraphNode_t **, const cudaGraphEdgeData **,
                                size_t *dependencies) {
    ENTER_UNCOUNTED;
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (graph) *graph = nullptr;
    if (dependencies) *dependencies = 0;
    return cudaSuccess;
}

EXPORT cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) {
    ENTER_UNCOUNTED;
    return cudaSuccess;
}

static cudaError_t create(cudaEvent_t *event, unsigned flags) {
    ENTER("event_create");
    EventHandle created{};
    int error = create_event(flags, &created);
    if (!error) *event = reinterpret_cast<cudaEvent_t>(created);
    return result(error);
}

EXPORT cudaEventCreate(cudaEvent_t *event) { return create(event, cudaEventDefault); }

EXPORT cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return create(event, flags); }

EXPORT cudaEventDestroy(cudaEvent_t event) {
    ENTER("event_destroy");
    return result(destroy_event(handle(event)));
}

EXPORT cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ENTER("event_record");
    return result(record_event(handle(event), handle(stream)));
}

EXPORT cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}

EXPORT cudaEventQuery(cudaEvent_t event) {
    ENTER("event_query");
    return answer(query_event(handle(event)));
}

EXPORT cudaEventSynchronize(cudaEvent_t event) {
    ENTER("event_sync");
    return result(synchronize_event(handle(event)));
}

EXPORT cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    ENTER("event_elapsed");
    return result(elapsed_time(handle(start), handle(end), milliseconds));
}

EXPORT cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
    ENTER("launch_host_func");
    return result(call_host(handle(stream), function, argument));
}

// ------------------------------------------------------------------------------------------------------------ kernels
//
// nvcc's code registers each kernel by the address of its host function when a library is loaded. No kernel can run
// here; those that fill memory, and torch's one that waits, are known by their names and done by hand.

namespace {

struct Kernel {
    std::string name;
};

struct Kernels {
    std::mutex mutex;
    std::unordered_map<const void *, Kernel> by_function;
};

// Never destroyed: libraries unregister their kernels when the process ends.
Kernels &kernels() {
    static Kernels &all = *new Kernels;
    return all;
}

Kernel *find_kernel(const void *function) {
    std::lock_guard<std::mutex> lock(kernels().mutex);
    return &kernels().by_function.try_emplace(function, Kernel{"a kernel without a name"}).first->second;
}

// Bytes of a type as C++ mangles it; 0: not known.
size_t width_of(const char *mangled) {
    switch (*mangled) {
            // clang-format off: a line per size
        case 'a': case 'b': case 'h': return 1;
        case 's': case 't': return 2;
        case 'f': case 'i': case 'j': return 4;
        case 'd': case 'l': case 'm': case 'x': case 'y': return 8;
        // clang-format on
        default: break;
    }
    for (const char *half : {"N3c104Half", "N3c108BFloat16"})
        if (!strncmp(mangled, half, strlen(half))) return 2;
    return 0;
}

// torch.cuda._sleep(cycles), as if the device's clock had 1 GHz.
std::function<int()> sleep_of(void **arguments) {
    constexpr int64_t CYCLES_PER_SECOND = 1000000000;
    int64_t cycles = *static_cast<int64_t *>(arguments[0]);
    return [cycles] {
        timespec time{cycles / CYCLES_PER_SECOND, cycles % CYCLES_PER_SECOND};
        nanosleep(&time, nullptr);
        return SUCCESS;
    };
}

// torch's fill_, zero_, zeros and ones: (number of elements, the functor that holds the value, pointers to the data).
std::function<int()> fill_of(void **arguments, size_t width) {
    auto count = static_cast<size_t>(*static_cast<int *>(arguments[0]));
    uint64_t value = 0;
    memcpy(&value, arguments[1], width);
    void *pointer = *static_cast<void **>(arguments[2]);
    return [=]() -> int {
        if (!is_allocated(pointer, count * width)) return ILLEGAL_ADDRESS;
        char *memory = shadow(pointer);
        for (size_t i = 0; i < count; i++) memcpy(memory + i * width, &value, width);
        return SUCCESS;
    };
}

// What a kernel does; empty: not known.
std::function<int()> effect_of(const char *name, void **arguments) {
    constexpr char FUNCTOR[] = "11FillFunctorI";
    if (strstr(name, "spin_kernel")) return sleep_of(arguments);
    const char *functor = strstr(name, FUNCTOR);
    if (functor && strstr(name, "29vectorized_elementwise_kernel"))
        if (size_t width = width_of(functor + strlen(FUNCTOR))) return fill_of(arguments, width);
    return nullptr;
}

cudaError_t launch(const Kernel *kernel, void **arguments, cudaStream_t stream) {
    ENTER("kernel_launch");
    const char *name = kernel->name.c_str();
    return result(launch_kernel(handle(stream), name, effect_of(name, arguments)));
}

struct LaunchConfiguration {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
};
thread_local std::vector<LaunchConfiguration> launch_configurations;

}  // namespace

EXPORT_AS(void **) __cudaRegisterFatBinary(void *) {
    static void *handle[8];
    return handle;
}

EXPORT_AS(void) __cudaRegisterFatBinaryEnd(void **) {}

EXPORT_AS(void) __cudaUnregisterFatBinary(void **) {}

EXPORT_AS(char) __cudaInitModule(void **) { return 0; }

EXPORT_AS(void)
__cudaRegisterFunction(void **, const char *function, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *,
                       int *) {
    if (is_forked()) return;  // the lock may be held for ever
    std::lock_guard<std::mutex> lock(kernels().mutex);
    kernels().by_function[function] = {name};
}

EXPORT_AS(void) __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}

EXPORT __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    ENTER_UNCOUNTED;
    *kernel = reinterpret_cast<cudaKernel_t>(find_kernel(function));
    return cudaSuccess;
}

EXPORT_AS(unsigned) __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    launch_configurations.push_back({grid, block, shared_bytes, stream});
    return 0;
}

EXPORT __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void *stream) {
    if (launch_configurations.empty()) return result(cudaErrorMissingConfiguration);
    LaunchConfiguration configuration = launch_configurations.back();
    launch_configurations.pop_back();
    *grid = configuration.grid;
    *block = configuration.block;
    *shared_bytes = configuration.shared_bytes;
    *static_cast<cudaStream_t *>(stream) = configuration.stream;
    return cudaSuccess;
}

EXPORT cudaLaunchKernel(const void *function, dim3, dim3, void **arguments, size_t, cudaStream_t stream) {
    ENTER_UNCOUNTED;
    return launch(find_kernel(function), arguments, stream);
}

EXPORT __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **arguments, size_t, cudaStream_t stream) {
    return launch(reinterpret_cast<Kernel *>(kernel), arguments, stream);
}

EXPORT cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *function, void **arguments) {
    ENTER_UNCOUNTED;
    return launch(find_kernel(function), arguments, configuration->stream);
}

EXPORT cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    ENTER_UNCOUNTED;
    constexpr int COMPUTE_CAPABILITY = 90;
    *attributes = {};
    attributes->maxThreadsPerBlock = device_attribute(cudaDevAttrMaxThreadsPerBlock);
    attributes->binaryVersion = attributes->ptxVersion = COMPUTE_CAPABILITY;
    return cudaSuccess;
}

EXPORT cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) {
    ENTER_UNCOUNTED;
    return cudaSuccess;
}

EXPORT cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int, size_t) {
    ENTER_UNCOUNTED;
    *blocks = 1;
    return cudaSuccess;
}

EXPORT cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
    ENTER_UNCOUNTED;
    *blocks = 1;
    return cudaSuccess;
}
