// The emulated device: what driver_api.cpp and runtime_api.cpp call, and what the emulator's own files share.
//
// Threads: every stream has a worker thread that runs its operations in order. One mutex guards all state; it is
// released while an operation sleeps, copies or calls somebody else's function. A function with a `const Lock &`
// parameter wants the mutex held; all others take it themselves. Functions that return int return a CUDA error code.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace cuda_emulator {

// The numbers are those of CUresult and of cudaError_t, which agree for all of them.
enum Code : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_WRONG_THREAD = 908,
};

// What an operation does. The first three have a copy engine; OTHER are records of events and waits for them. The order
// is that of `Kind` in __init__.py.
enum Kind : int { H2D, D2H, D2D, H2H, MEMSET, KERNEL, HOSTFN, OTHER, KINDS };
constexpr int ENGINES = D2D + 1;
constexpr Kind ANY_KIND = OTHER;

// When a copy reads its source. The numbers are those of CUmemcpySrcAccessOrder.
enum class SourceOrder { STREAM = 1, DURING_API_CALL = 2, ANY = 3 };

// What an application sees of a stream and of an event: a number that is never used again. Streams 0 and 1 are the
// legacy default stream of the calling thread's device.
enum class StreamHandle : uintptr_t {};
enum class EventHandle : uintptr_t {};
constexpr StreamHandle LEGACY_STREAM{0};
constexpr StreamHandle LEGACY_STREAM_BY_NAME{1};

constexpr uintptr_t HANDLE_STEP = 0x10;

constexpr unsigned STREAM_NON_BLOCKING = 1;
constexpr unsigned EVENT_DISABLE_TIMING = 2;
constexpr unsigned HOST_REGISTER_READ_ONLY = 8;
constexpr int LOWEST_PRIORITY = 0;
constexpr int HIGHEST_PRIORITY = -5;
constexpr int DRIVER_VERSION = 13000;
// CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
constexpr int HOST_POINTER_OF_REGISTERED = 91;
// Up to this many bytes of pageable memory go to the device without a wait for the stream.
constexpr size_t STAGED_AT_ONCE = 64 << 10;

// ------------------------------------------------------------------------------------------------ for the API layers

// One call of the API. `begin` comes first in each: it counts the call and says whether it must fail (after a fork, in
// a host function, after a sticky error, by injection).
int begin(const char *api);
int initialize();
bool is_initialized();  // false in a forked child as well
bool is_forked();

struct ErrorText {
    int code;
    const char *driver_name;
    const char *runtime_name;
    const char *text;
};
const ErrorText *error_text(int code);  // null: unknown
int device_attribute(int attribute);    // CUdevice_attribute and cudaDeviceAttr share their numbers

int device_count();
size_t total_memory();
size_t free_memory(int device);

// The calling thread's stack of contexts. There is one context a device, the primary one.
bool has_context();
int current_device();  // 0 without a context
int set_device(int device);
int push_context(int device);
int pop_context(int *device);
void clear_context();
void use_context();  // as the runtime does by itself: the first device's where none is current, and kept for good
void retain_context(int device);
int release_context(int device);
bool is_context_active(int device);

// Memory.
int allocate(size_t bytes, void **pointer);
int release(void *pointer);
bool find_allocation(const void *pointer, void **base, size_t *bytes, int *device);
int allocate_host(size_t bytes, void **pointer);
int free_host(void *pointer);
int register_host(void *pointer, size_t bytes, unsigned flags);
int unregister_host(void *pointer);
bool find_pinned(const void *pointer, void **base, size_t *bytes);
char *shadow(const void *device_pointer);  // the same bytes where the emulator may touch them; null: no device pointer
bool is_allocated(const void *device_pointer, size_t bytes);

// Streams and events.
int create_stream(unsigned flags, int priority, StreamHandle *handle);
int destroy_stream(StreamHandle handle);
int query_stream(StreamHandle handle);
int synchronize_stream(StreamHandle handle);
int describe_stream(StreamHandle handle, unsigned *flags, int *priority, int *device);
int synchronize_device();
int create_event(unsigned flags, EventHandle *handle);
int destroy_event(EventHandle handle);
int record_event(EventHandle event, StreamHandle stream);
int query_event(EventHandle handle);
int synchronize_event(EventHandle handle);
int elapsed_time(EventHandle start, EventHandle end, float *milliseconds);
int wait_event(StreamHandle stream, EventHandle event);

// Captures: see captures.cpp. The numbers are those of CUstreamCaptureMode and CUstreamCaptureStatus.
enum CaptureMode : int { CAPTURE_GLOBAL, CAPTURE_THREAD_LOCAL, CAPTURE_RELAXED };
enum class CaptureStatus { NONE, ACTIVE, INVALIDATED };
int begin_capture(StreamHandle stream, int mode);
int end_capture(StreamHandle stream, uintptr_t *graph);
CaptureStatus capture_status(StreamHandle stream);
int exchange_capture_mode(int *mode);  // the calling thread's

// Work on streams.
struct CopyRequest {
    void *destination;
    const void *source;
    size_t bytes;
    SourceOrder order = SourceOrder::STREAM;
};
struct BatchAttributes {  // the layout of CUmemcpyAttributes and of cudaMemcpyAttributes
    int order;
    int locations[4];
    unsigned flags;
};
int copy(const CopyRequest &request, Kind required, StreamHandle stream, bool blocking);
int copy_rows(const std::vector<CopyRequest> &rows, Kind required, StreamHandle stream);
int copy_batch(void *const *destinations, const void *const *sources, const size_t *sizes, size_t count,
               const BatchAttributes *attributes, const size_t *attributes_from, size_t attribute_count,
               StreamHandle stream);
int fill(void *pointer, uint32_t value, size_t width, size_t count, StreamHandle stream);
int call_host(StreamHandle stream, void (*function)(void *), void *argument);
int launch_kernel(StreamHandle stream, const char *name, std::function<int()> effect);  // no effect: unknown kernel

int sticky_error();
bool is_hidden(const char *symbol);
void refuse(const char *name);  // says on stderr that something is not emulated

// ------------------------------------------------------------------------------------------ for the emulator's files

using Lock = std::unique_lock<std::mutex>;

struct Completion {
    bool done = false;
    double seconds = 0;  // when it was done, on a clock that only moves on
};

struct Copy {
    char *destination;
    const char *source;
    size_t bytes;
    Kind kind;
    bool staged = false;  // whether the source was read when the copy was submitted
    std::vector<char> stage;
    bool source_replaced = false;  // see is_mapped_anew
    bool destination_replaced = false;
};

struct Operation {
    Kind kind = OTHER;
    std::vector<Copy> copies;
    std::function<int()> action;
    std::shared_ptr<Completion> completion = std::make_shared<Completion>();
    std::vector<std::shared_ptr<Completion>> dependencies;
    int injected = SUCCESS;
    size_t bytes = 0;
    uint64_t submission = 0;  // counts through all streams: the order in which copy engines serve
};

struct Stream {
    StreamHandle handle;
    unsigned flags;
    int priority;
    int device;
    std::deque<Operation> queue;  // an operation stays at the front while it runs
    uint64_t submitted = 0;
    uint64_t finished = 0;
    bool has_worker = false;
    bool running = false;
    bool destroyed = false;
    bool held = false;
    uint64_t steps = 0;    // operations that may run although the stream is held
    double delay_us = -1;  // below zero: the kind's delay
    std::shared_ptr<Completion> last;
    std::condition_variable wake;
};

struct Event {
    unsigned flags;
    std::shared_ptr<Completion> recorded;  // what the last record captured; null: never recorded
};

struct Capture {
    std::thread::id thread;
    int mode;
    bool invalidated;
};

struct Rule {
    std::string point;
    long countdown;
    int code;
    bool asynchronous;
};

struct Settings {
    double delay_us[KINDS] = {};
    double bandwidth_gb_s = 0;    // of a copy engine; 0: no limit
    double shared_bandwidth = 1;  // the part of it that is left where both directions are busy
    double jitter_us = 0;
    uint64_t seed = 0;
    bool poison = false;
    bool ignore_kernels = false;
    bool hold_new_streams = false;
    bool unregister_waits = false;
    std::map<int, int> attributes;  // of devices, instead of what they are
};

struct Device {
    char *window;                        // what applications see: no access
    char *memory;                        // the same bytes again, readable and writable
    std::map<size_t, size_t> allocated;  // offset: bytes
    bool engine_busy[ENGINES] = {};
    std::shared_ptr<Stream> legacy_stream;
    int context_retains = 0;
    bool context_kept = false;  // the runtime has retained it, and never releases it
};

struct Pinned {
    size_t bytes;
    bool ours;    // allocated by us, not registered
    bool marked;  // see is_mapped_anew
};

struct CopyCount {
    uint64_t entries = 0;
    uint64_t bytes = 0;
};

struct State {
    State();  // reads the environment

    std::mutex mutex;
    std::condition_variable finished;  // an operation has ended
    std::condition_variable hurry;     // delays end early, because of a reset, or copies get another rate

    std::atomic<bool> initialized{false};
    std::atomic<bool> forked{false};
    int device_count;
    size_t memory_bytes;
    std::vector<Device> devices;
    std::map<uintptr_t, Pinned> pinned;
    std::map<StreamHandle, std::shared_ptr<Stream>> streams;
    std::map<EventHandle, Event> events;
    std::map<StreamHandle, Capture> captures;
    uintptr_t next_handle = 0x1000;
    uint64_t submissions = 0;

    int sticky = SUCCESS;
    const Settings defaults;
    Settings settings;
    std::mt19937_64 random;
    std::vector<Rule> rules;
    std::set<std::string> hidden;
    uint64_t resets = 0;
    std::map<std::string, uint64_t> calls;
    std::vector<std::string> violations;
    CopyCount copied[KINDS];
    uint64_t pageable_copies = 0;
};
extern State &state;

// CAPTURE_UNSUPPORTED where a call is unsafe while somebody captures, whose capture is lost then; or SUCCESS.
int check_captures(const Lock &, const std::string &api);
// The code of an injection rule that comes due at this point, or SUCCESS.
int injected_error(const Lock &, const std::string &point, bool asynchronous);
void add_rules(State &to, const char *text);  // "point@nth=code[:async];..."
void add_violation(const Lock &, const char *format, ...) __attribute__((format(printf, 2, 3)));
std::shared_ptr<Stream> find_stream(const Lock &, StreamHandle handle);  // null: no such stream
// For a call of the API: that there is no such stream is a violation.
std::shared_ptr<Stream> stream_to_use(const Lock &, StreamHandle handle);
bool is_idle(const Lock &, const Stream &stream);
void wake_workers(const Lock &);

bool is_device_pointer(const void *pointer);
// What a range of host memory is for a copy. MIXED: part of it is pinned, and part of it is not.
enum class HostRange { PAGEABLE, PINNED, PINNED_APART, MIXED };
HostRange host_range(const Lock &, const void *pointer, size_t bytes);
bool is_registered(const Lock &, const void *pointer);  // pinned, but not allocated by us
// Whether a range was registered and something else has been mapped there since: the driver still copies from and to
// the pages that it pinned, which nobody sees any more.
bool is_mapped_anew(const Lock &, const void *pointer, size_t bytes);
bool is_allocated(const Lock &, const void *device_pointer, size_t bytes);
int device_attribute(const Lock &, int attribute);
// Copies between host addresses (of which shadows are some): ILLEGAL_ADDRESS, not a crash, where nothing is mapped.
int move_host(char *destination, const char *source, size_t bytes);

}  // namespace cuda_emulator
