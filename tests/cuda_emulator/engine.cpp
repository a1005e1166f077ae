// Contexts, streams, events, the workers that run operations, and the copy engines.
#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

namespace cuda_emulator {

namespace {

constexpr char POISON = static_cast<char>(0xDB);
constexpr size_t POISON_CHUNK = 64 << 10;

thread_local std::vector<int> context_stack;
thread_local bool in_host_function = false;

double environment(const char *name, double otherwise) {
    const char *value = getenv(name);
    return value && *value ? atof(value) : otherwise;
}

Settings settings_from_environment() {
    Settings settings;
    double all = environment("CUDAEMU_DELAY_US", 0);
    std::fill(settings.delay_us, settings.delay_us + OTHER, all);
    settings.delay_us[H2D] = environment("CUDAEMU_DELAY_H2D_US", all);
    settings.delay_us[D2H] = environment("CUDAEMU_DELAY_D2H_US", all);
    settings.bandwidth_gb_s = environment("CUDAEMU_BW_GBPS", 0);
    settings.shared_bandwidth = environment("CUDAEMU_SHARED_BW", 1);
    if (!(settings.shared_bandwidth > 0 && settings.shared_bandwidth <= 1)) {
        fprintf(stderr, "[cuda emulator] CUDAEMU_SHARED_BW is not above 0 and up to 1\n");
        settings.shared_bandwidth = 1;
    }
    settings.jitter_us = environment("CUDAEMU_JITTER_US", 0);
    settings.seed = static_cast<uint64_t>(environment("CUDAEMU_SEED", 0));
    settings.poison = environment("CUDAEMU_POISON", 0) != 0;
    settings.ignore_kernels = environment("CUDAEMU_IGNORE_KERNELS", 0) != 0;
    settings.unregister_waits = environment("CUDAEMU_UNREGISTER_WAITS", 0) != 0;
    return settings;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

StreamHandle new_stream_handle(const Lock &) { return StreamHandle{state.next_handle += HANDLE_STEP}; }

EventHandle new_event_handle(const Lock &) { return EventHandle{state.next_handle += HANDLE_STEP}; }

std::shared_ptr<Stream> new_stream(const Lock &lock, unsigned flags, int priority, int device) {
    auto stream = std::make_shared<Stream>();
    stream->handle = new_stream_handle(lock);
    stream->flags = flags;
    stream->priority = std::max(HIGHEST_PRIORITY, std::min(LOWEST_PRIORITY, priority));
    stream->device = device;
    state.streams[stream->handle] = stream;
    return stream;
}

}  // namespace

// Never destroyed: workers run until the process ends.
State &state = *new State;

State::State()
    : device_count(std::max(1, static_cast<int>(environment("CUDAEMU_DEVICES", 1)))),
      memory_bytes(static_cast<size_t>(environment("CUDAEMU_MEM_MB", 8192)) << 20),
      defaults(settings_from_environment()),
      settings(defaults),
      random(defaults.seed) {
    add_rules(*this, getenv("CUDAEMU_FAIL"));
}

int initialize() {
    if (is_forked()) return NOT_INITIALIZED;
    if (state.initialized) return SUCCESS;
    Lock lock(state.mutex);
    if (state.initialized) return SUCCESS;
    for (int i = 0; i < state.device_count; i++) {
        // The same memory twice: applications get the mapping that nobody may touch, so that a host access to a device
        // pointer faults as it would with a GPU. Neither goes to forked children, where CUDA must not be used.
        int file = memfd_create("cuda-emulator", MFD_CLOEXEC);
        if (file < 0 || ftruncate(file, static_cast<off_t>(state.memory_bytes))) return OUT_OF_MEMORY;
        constexpr int SHARED = MAP_SHARED | MAP_NORESERVE;
        void *window = mmap(nullptr, state.memory_bytes, PROT_NONE, SHARED, file, 0);
        void *memory = mmap(nullptr, state.memory_bytes, PROT_READ | PROT_WRITE, SHARED, file, 0);
        close(file);
        if (window == MAP_FAILED || memory == MAP_FAILED) return OUT_OF_MEMORY;
        madvise(window, state.memory_bytes, MADV_DONTFORK);
        madvise(memory, state.memory_bytes, MADV_DONTFORK);
        Device device{};
        device.window = static_cast<char *>(window);
        device.memory = static_cast<char *>(memory);
        device.legacy_stream = new_stream(lock, 0, LOWEST_PRIORITY, i);
        state.devices.push_back(std::move(device));
    }
    pthread_atfork(nullptr, nullptr, [] { state.forked = true; });
    state.initialized = true;
    return SUCCESS;
}

bool is_forked() { return state.forked; }

bool is_initialized() { return state.initialized && !is_forked(); }

int device_count() { return state.device_count; }

int begin(const char *api) {
    // Before the lock: in a forked child it may be held for ever, by a thread that is not there.
    if (!is_initialized()) return NOT_INITIALIZED;
    Lock lock(state.mutex);
    if (in_host_function) {
        add_violation(lock, "%s called in a host function", api);
        return NOT_PERMITTED;
    }
    state.calls[api]++;
    if (state.sticky) return state.sticky;
    if (int error = check_captures(lock, api)) return error;
    return injected_error(lock, api, false);
}

int sticky_error() {
    if (is_forked()) return NOT_INITIALIZED;
    Lock lock(state.mutex);
    return state.sticky;
}

// ---------------------------------------------------------------------------------------------------------- contexts

bool has_context() { return !context_stack.empty(); }

int current_device() { return context_stack.empty() ? 0 : context_stack.back(); }

int set_device(int device) {
    if (device < 0 || device >= state.device_count) return INVALID_DEVICE;
    if (context_stack.empty()) context_stack.push_back(device);
    context_stack.back() = device;
    return SUCCESS;
}

int push_context(int device) {
    if (device < 0 || device >= state.device_count) return INVALID_CONTEXT;
    context_stack.push_back(device);
    return SUCCESS;
}

int pop_context(int *device) {
    if (context_stack.empty()) return INVALID_CONTEXT;
    if (device) *device = context_stack.back();
    context_stack.pop_back();
    return SUCCESS;
}

void clear_context() {
    if (!context_stack.empty()) context_stack.pop_back();
}

void use_context() {
    if (context_stack.empty()) context_stack.push_back(0);
    Lock lock(state.mutex);
    state.devices[context_stack.back()].context_kept = true;
}

void retain_context(int device) {
    Lock lock(state.mutex);
    state.devices[device].context_retains++;
}

// The last release would destroy a real context; here everything stays.
int release_context(int device) {
    Lock lock(state.mutex);
    if (!state.devices[device].context_retains) return INVALID_CONTEXT;
    state.devices[device].context_retains--;
    return SUCCESS;
}

bool is_context_active(int device) {
    Lock lock(state.mutex);
    return state.devices[device].context_kept || state.devices[device].context_retains > 0;
}

// ------------------------------------------------------------------------------------------------------- copy engines
//
// A device has one engine for each of H2D, D2H and D2D, shared by all its streams. Whenever an engine is free it takes,
// of all copies of its kind that are ready, the one that was submitted first.

namespace {

bool uses_engine(const Operation &operation) { return operation.kind < ENGINES; }

// Event records and waits take no time: a worker ends them without releasing the lock.
bool is_instant(const Operation &operation) { return operation.kind == OTHER; }

bool dependencies_done(const Operation &operation) {
    return std::all_of(operation.dependencies.begin(), operation.dependencies.end(),
                       [](const auto &dependency) { return dependency->done; });
}

// The copy that a stream has ready, if any. Events before it do not count, or else a copy of another stream could slip
// in between two copies of this one just because this one's worker was slow to wake up.
const Operation *ready_copy(const Stream &stream) {
    if (stream.running) return nullptr;
    uint64_t passed = 0;
    for (const Operation &operation : stream.queue) {
        if (stream.held && passed == stream.steps) return nullptr;
        if (!dependencies_done(operation)) return nullptr;
        if (uses_engine(operation)) return &operation;
        if (!is_instant(operation)) return nullptr;
        passed++;
    }
    return nullptr;
}

bool is_next_for_engine(const Operation &operation, const Stream &owner) {
    if (state.devices[owner.device].engine_busy[operation.kind]) return false;
    for (auto &[handle, stream] : state.streams) {
        if (stream->device != owner.device) continue;
        const Operation *other = ready_copy(*stream);
        if (other && other->kind == operation.kind && other->submission < operation.submission) return false;
    }
    return true;
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------ workers

namespace {

bool can_start(const Stream &stream) {
    if (stream.queue.empty() || (stream.held && !stream.steps)) return false;
    const Operation &operation = stream.queue.front();
    return dependencies_done(operation) && (!uses_engine(operation) || is_next_for_engine(operation, stream));
}

bool overlap(const char *a, const char *b, size_t bytes) { return a < b + bytes && b < a + bytes; }

int poison(const Copy &copy) {
    // Device to device in place: poisoning the destination would spoil the source.
    if (copy.kind == D2D && overlap(copy.destination, copy.source, copy.bytes)) return SUCCESS;
    static const std::vector<char> junk(POISON_CHUNK, POISON);
    char *device = shadow(copy.destination);
    char *destination = device ? device : copy.destination;
    int error = SUCCESS;
    for (size_t at = 0; at < copy.bytes && !error; at += POISON_CHUNK)
        error = move_host(destination + at, junk.data(), std::min(POISON_CHUNK, copy.bytes - at));
    return error;
}

int perform(const Copy &copy) {
    if (copy.destination_replaced) return SUCCESS;
    if (copy.source_replaced) return poison(copy);  // what the old pages hold is not known any more
    char *destination = copy.destination;
    const char *source = copy.staged ? copy.stage.data() : copy.source;
    if (char *device = shadow(destination)) destination = device;
    if (!copy.staged)
        if (char *device = shadow(source)) source = device;
    if (copy.kind == D2D) {
        memmove(destination, source, copy.bytes);
        return SUCCESS;
    }
    int error = move_host(destination, source, copy.bytes);
    if (error)
        fprintf(stderr, "[cuda emulator] a copy of %zu bytes from %p to %p touched host memory that is not mapped\n",
                copy.bytes, static_cast<const void *>(copy.source), static_cast<void *>(copy.destination));
    return error;
}

// Whether the host memory of some copy was mapped anew under its registration; notes it in each that it is true of.
bool find_replaced(const Lock &lock, Operation &operation) {
    bool any = false;
    for (Copy &copy : operation.copies) {
        copy.destination_replaced = is_mapped_anew(lock, copy.destination, copy.bytes);
        copy.source_replaced = !copy.staged && is_mapped_anew(lock, copy.source, copy.bytes);
        any |= copy.destination_replaced || copy.source_replaced;
    }
    return any;
}

// What an operation takes beside its bytes.
double delay_us(const Lock &, const Stream &stream, const Operation &operation) {
    const Settings &settings = state.settings;
    double us = stream.delay_us >= 0 ? stream.delay_us : settings.delay_us[operation.kind];
    if (settings.jitter_us > 0) us += std::uniform_real_distribution<>(0, settings.jitter_us)(state.random);
    return us;
}

// The part of its bandwidth that a copy has at this moment.
double bandwidth_share(const Lock &, const Device &device, Kind kind) {
    bool both = device.engine_busy[H2D] && device.engine_busy[D2H];
    return both && kind != D2D ? state.settings.shared_bandwidth : 1;
}

// Takes the time of a copy's bytes, or less if there is a reset. The rate changes as the other direction begins and
// ends. The lock is released meanwhile.
void spend_bandwidth(Lock &lock, const Device &device, const Operation &operation, double bytes_s, uint64_t resets) {
    double left = static_cast<double>(operation.bytes);
    while (left > 0 && state.resets == resets) {
        double share = bandwidth_share(lock, device, operation.kind);
        double began = now();
        state.hurry.wait_for(lock, std::chrono::duration<double>(left / (bytes_s * share)), [&] {
            return state.resets != resets || bandwidth_share(lock, device, operation.kind) != share;
        });
        left -= (now() - began) * bytes_s * share;
    }
}

// Runs the operation at the front of the stream; the lock is released while that takes time.
int run(Lock &lock, Stream &stream, Operation &operation) {
    Device &device = state.devices[stream.device];
    auto set_engine_busy = [&](bool busy) {
        if (!uses_engine(operation)) return;
        device.engine_busy[operation.kind] = busy;
        if (state.settings.shared_bandwidth < 1) state.hurry.notify_all();  // the other direction has another rate now
    };
    set_engine_busy(true);
    stream.running = true;
    double us = delay_us(lock, stream, operation);
    double bytes_s = uses_engine(operation) ? state.settings.bandwidth_gb_s * 1e9 : 0;
    bool poisoned = state.settings.poison;
    uint64_t resets = state.resets;
    // The entries of a batch have no order among them.
    std::shuffle(operation.copies.begin(), operation.copies.end(), state.random);
    find_replaced(lock, operation);
    lock.unlock();

    if (poisoned)
        for (const Copy &copy : operation.copies)
            if (!copy.destination_replaced) poison(copy);
    lock.lock();
    if (us > 0)
        state.hurry.wait_for(lock, std::chrono::duration<double, std::micro>(us),
                             [&] { return state.resets != resets; });
    if (bytes_s > 0) spend_bandwidth(lock, device, operation, bytes_s, resets);
    int error = operation.injected;  // not sooner: a reset may have taken it back
    if (find_replaced(lock, operation))
        add_violation(lock, "a copy of %zu bytes with registered host memory that was mapped anew", operation.bytes);
    lock.unlock();
    for (const Copy &copy : operation.copies) {
        if (error) break;
        error = perform(copy);
    }
    if (!error && operation.action) error = operation.action();

    lock.lock();
    stream.running = false;
    set_engine_busy(false);
    return error;
}

void work(std::shared_ptr<Stream> stream) {
    pthread_setname_np(pthread_self(), "cuda-stream");
    Lock lock(state.mutex);
    for (;;) {
        stream->wake.wait(lock, [&] { return can_start(*stream) || (stream->destroyed && stream->queue.empty()); });
        if (stream->queue.empty()) break;
        Operation &operation = stream->queue.front();
        if (stream->held) stream->steps--;
        // A lost context runs nothing any more, but everything ends.
        int error = state.sticky;
        if (!error) error = is_instant(operation) ? operation.injected : run(lock, *stream, operation);
        if (error && !state.sticky) state.sticky = error;
        operation.completion->done = true;
        operation.completion->seconds = now();
        stream->queue.pop_front();
        stream->finished++;
        state.finished.notify_all();
        wake_workers(lock);
    }
    state.streams.erase(stream->handle);
}

// The legacy default stream waits for all streams that were made without NON_BLOCKING, and they wait for it.
void add_legacy_dependencies(const Lock &, const Stream &stream, Operation &operation) {
    auto depend = [&](const Stream &on) {
        if (on.last && !on.last->done) operation.dependencies.push_back(on.last);
    };
    const Stream &legacy = *state.devices[stream.device].legacy_stream;
    if (&stream != &legacy) {
        if (!(stream.flags & STREAM_NON_BLOCKING)) depend(legacy);
        return;
    }
    for (auto &[handle, other] : state.streams)
        if (other.get() != &stream && other->device == stream.device && !(other->flags & STREAM_NON_BLOCKING))
            depend(*other);
}

void submit(const Lock &lock, const std::shared_ptr<Stream> &stream, Operation operation) {
    add_legacy_dependencies(lock, *stream, operation);
    operation.submission = ++state.submissions;
    stream->last = operation.completion;
    stream->queue.push_back(std::move(operation));
    stream->submitted++;
    if (!stream->has_worker) {
        stream->has_worker = true;
        std::thread(work, stream).detach();
    }
    stream->wake.notify_one();
}

void wait_until_done(Lock &lock, const std::shared_ptr<Stream> &stream) {
    uint64_t submitted = stream->submitted;
    state.finished.wait(lock, [&] { return stream->finished >= submitted; });
}

}  // namespace

void wake_workers(const Lock &) {
    for (auto &[handle, stream] : state.streams)
        if (!stream->queue.empty() && !stream->running) stream->wake.notify_one();
}

bool is_idle(const Lock &, const Stream &stream) { return stream.finished == stream.submitted; }

// ------------------------------------------------------------------------------------------------------------ streams

std::shared_ptr<Stream> find_stream(const Lock &, StreamHandle handle) {
    if (state.devices.empty()) return nullptr;
    if (handle == LEGACY_STREAM || handle == LEGACY_STREAM_BY_NAME)
        return state.devices[current_device()].legacy_stream;
    auto found = state.streams.find(handle);
    return found == state.streams.end() || found->second->destroyed ? nullptr : found->second;
}

std::shared_ptr<Stream> stream_to_use(const Lock &lock, StreamHandle handle) {
    auto stream = find_stream(lock, handle);
    if (!stream)
        add_violation(lock, "stream %#zx used, which is destroyed or was never there", static_cast<size_t>(handle));
    return stream;
}

int create_stream(unsigned flags, int priority, StreamHandle *handle) {
    Lock lock(state.mutex);
    auto stream = new_stream(lock, flags, priority, current_device());
    stream->held = state.settings.hold_new_streams;
    *handle = stream->handle;
    return SUCCESS;
}

// What is queued on a destroyed stream still runs.
int destroy_stream(StreamHandle handle) {
    Lock lock(state.mutex);
    auto stream = stream_to_use(lock, handle);
    if (!stream || stream == state.devices[stream->device].legacy_stream) return INVALID_HANDLE;
    stream->destroyed = true;
    if (stream->has_worker) stream->wake.notify_one();
    else state.streams.erase(handle);
    return SUCCESS;
}

int query_stream(StreamHandle handle) {
    Lock lock(state.mutex);
    auto stream = stream_to_use(lock, handle);
    if (!stream) return INVALID_HANDLE;
    if (state.sticky) return state.sticky;
    return is_idle(lock, *stream) ? SUCCESS : NOT_READY;
}

int synchronize_stream(StreamHandle handle) {
    Lock lock(state.mutex);
    auto stream = stream_to_use(lock, handle);
    if (!stream) return INVALID_HANDLE;
    wait_until_done(lock, stream);
    return state.sticky;
}

int synchronize_device() {
    Lock lock(state.mutex);
    std::vector<std::shared_ptr<Stream>> streams;
    for (auto &[handle, stream] : state.streams)
        if (stream->device == current_device()) streams.push_back(stream);
    for (auto &stream : streams) wait_until_done(lock, stream);
    return state.sticky;
}

int describe_stream(StreamHandle handle, unsigned *flags, int *priority, int *device) {
    Lock lock(state.mutex);
    auto stream = stream_to_use(lock, handle);
    if (!stream) return INVALID_HANDLE;
    if (flags) *flags = stream->flags;
    if (priority) *priority = stream->priority;
    if (device) *device = stream->device;
    return SUCCESS;
}

// ------------------------------------------------------------------------------------------------------------- events

int create_event(unsigned flags, EventHandle *handle) {
    Lock lock(state.mutex);
    *handle = new_event_handle(lock);
    state.events[*handle] = {flags, nullptr};
    return SUCCESS;
}

int destroy_event(EventHandle handle) {
    Lock lock(state.mutex);
    return state.events.erase(handle) ? SUCCESS : INVALID_HANDLE;
}

// Captures what is on the stream now: who waits for the event waits for that, even if the event is recorded again.
int record_event(EventHandle handle, StreamHandle on) {
    Lock lock(state.mutex);
    auto event = state.events.find(handle);
    auto stream = stream_to_use(lock, on);
    if (event == state.events.end() || !stream) return INVALID_HANDLE;
    Operation operation;
    operation.injected = injected_error(lock, "event_record", true);
    event->second.recorded = operation.completion;
    submit(lock, stream, std::move(operation));
    return SUCCESS;
}

int query_event(EventHandle handle) {
    Lock lock(state.mutex);
    auto event = state.events.find(handle);
    if (event == state.events.end()) return INVALID_HANDLE;
    if (state.sticky) return state.sticky;
    auto &recorded = event->second.recorded;
    return !recorded || recorded->done ? SUCCESS : NOT_READY;
}

int synchronize_event(EventHandle handle) {
    Lock lock(state.mutex);
    auto event = state.events.find(handle);
    if (event == state.events.end()) return INVALID_HANDLE;
    auto recorded = event->second.recorded;
    if (recorded) state.finished.wait(lock, [&] { return recorded->done; });
    return state.sticky;
}

int elapsed_time(EventHandle start, EventHandle end, float *milliseconds) {
    Lock lock(state.mutex);
    const Completion *ends[2];
    EventHandle handles[2] = {start, end};
    for (int i = 0; i < 2; i++) {
        auto event = state.events.find(handles[i]);
        if (event == state.events.end() || event->second.flags & EVENT_DISABLE_TIMING) return INVALID_HANDLE;
        ends[i] = event->second.recorded.get();
        if (!ends[i]) return INVALID_HANDLE;
    }
    if (state.sticky) return state.sticky;
    if (!ends[0]->done || !ends[1]->done) return NOT_READY;
    *milliseconds = static_cast<float>((ends[1]->seconds - ends[0]->seconds) * 1e3);
    return SUCCESS;
}

int wait_event(StreamHandle handle, EventHandle on) {
    Lock lock(state.mutex);
    auto event = state.events.find(on);
    auto stream = stream_to_use(lock, handle);
    if (event == state.events.end() || !stream) return INVALID_HANDLE;
    auto &recorded = event->second.recorded;
    if (!recorded || recorded->done) return SUCCESS;
    Operation operation;
    operation.dependencies.push_back(recorded);
    submit(lock, stream, std::move(operation));
    return SUCCESS;
}

// ------------------------------------------------------------------------------------------------------------- copies

namespace {

Kind kind_of(bool to_device, bool from_device) {
    if (to_device) return from_device ? D2D : H2D;
    return from_device ? D2H : H2H;
}

const char *injection_point(Kind kind) {
    switch (kind) {
        case H2D: return "exec_h2d";
        case D2H: return "exec_d2h";
        case D2D: return "exec_d2d";
        default: return "exec_h2h";
    }
}

int submit_copies(const std::vector<CopyRequest> &requests, Kind required, StreamHandle on, bool blocking,
                  bool batch = false) {
    Lock lock(state.mutex);
    auto stream = stream_to_use(lock, on);
    if (!stream) return INVALID_HANDLE;
    Operation operation;
    bool synchronize_before = false;
    size_t staged_bytes = 0;
    uint64_t pageable = 0;
    for (const CopyRequest &request : requests) {
        if (!request.destination || !request.source) return INVALID_VALUE;
        bool to_device = is_device_pointer(request.destination);
        bool from_device = is_device_pointer(request.source);
        if (to_device && !is_allocated(lock, request.destination, request.bytes)) return INVALID_VALUE;
        if (from_device && !is_allocated(lock, request.source, request.bytes)) return INVALID_VALUE;
        Kind kind = kind_of(to_device, from_device);
        if (required != ANY_KIND && kind != required) return INVALID_VALUE;
        bool to_pageable = false;
        bool from_pageable = false;
        auto is_refused = [&](const void *pointer, bool *pageable) {
            HostRange range = host_range(lock, pointer, request.bytes);
            *pageable = range != HostRange::PINNED;
            // Without the attribute the device has another address for registered memory, which a batch does not use.
            if (batch && is_registered(lock, pointer) && !device_attribute(lock, HOST_POINTER_OF_REGISTERED))
                operation.injected = ILLEGAL_ADDRESS;
            return range == HostRange::MIXED || (range == HostRange::PINNED_APART && batch);
        };
        if (!to_device && is_refused(request.destination, &to_pageable)) return INVALID_VALUE;
        if (!from_device && is_refused(request.source, &from_pageable)) return INVALID_VALUE;
        // From pageable memory: what is on the stream ends first, unless little goes to the device; then the source is
        // read before the call returns. To pageable memory, and from host to host: it returns when the copy is done.
        if (from_pageable && request.order == SourceOrder::STREAM) {
            staged_bytes += request.bytes;
            if (kind != H2D || staged_bytes > STAGED_AT_ONCE) synchronize_before = true;
        }
        if (to_pageable || kind == H2H) blocking = true;
        if (to_pageable || from_pageable) pageable++;
        Copy copy{static_cast<char *>(request.destination),
                  static_cast<const char *>(request.source),
                  request.bytes,
                  kind,
                  from_pageable || request.order != SourceOrder::STREAM,
                  {}};
        // The engine of a batch is that of its first entry.
        if (operation.copies.empty()) operation.kind = kind;
        operation.bytes += copy.bytes;
        operation.copies.push_back(std::move(copy));
    }
    if (operation.copies.empty()) return SUCCESS;

    if (synchronize_before) {
        wait_until_done(lock, stream);
        if (state.sticky) return state.sticky;
    }
    for (Copy &copy : operation.copies) {
        if (is_mapped_anew(lock, copy.source, copy.bytes)) copy.staged = false;  // seen to when it runs
        if (!copy.staged) continue;
        copy.stage.resize(copy.bytes);
        const char *device = shadow(copy.source);
        if (move_host(copy.stage.data(), device ? device : copy.source, copy.bytes)) return INVALID_VALUE;
    }
    if (!operation.injected) operation.injected = injected_error(lock, injection_point(operation.kind), true);
    if (!operation.injected) operation.injected = injected_error(lock, "exec_copy", true);
    for (const Copy &copy : operation.copies) {
        state.copied[copy.kind].entries++;
        state.copied[copy.kind].bytes += copy.bytes;
    }
    state.pageable_copies += pageable;
    submit(lock, stream, std::move(operation));
    if (!blocking) return SUCCESS;
    wait_until_done(lock, stream);
    return state.sticky;
}

}  // namespace

int copy(const CopyRequest &request, Kind required, StreamHandle stream, bool blocking) {
    return request.bytes ? submit_copies({request}, required, stream, blocking) : SUCCESS;
}

int copy_rows(const std::vector<CopyRequest> &rows, Kind required, StreamHandle stream) {
    return submit_copies(rows, required, stream, false);
}

int copy_batch(void *const *destinations, const void *const *sources, const size_t *sizes, size_t count,
               const BatchAttributes *attributes, const size_t *attributes_from, size_t attribute_count,
               StreamHandle stream) {
    if (stream == LEGACY_STREAM || stream == LEGACY_STREAM_BY_NAME) return INVALID_VALUE;
    if (!destinations || !sources || !sizes || !count || !attributes || !attributes_from) return INVALID_VALUE;
    if (!attribute_count || attribute_count > count || attributes_from[0] != 0) return INVALID_VALUE;
    for (size_t i = 0; i < attribute_count; i++) {
        int order = attributes[i].order;
        if (order < static_cast<int>(SourceOrder::STREAM) || order > static_cast<int>(SourceOrder::ANY))
            return INVALID_VALUE;
        if (attributes_from[i] >= count || (i && attributes_from[i] <= attributes_from[i - 1])) return INVALID_VALUE;
    }
    std::vector<CopyRequest> requests(count);
    size_t current = 0;  // attributes that hold for the entry: each set from its first entry to the next set's
    for (size_t i = 0; i < count; i++) {
        if (!sizes[i]) return INVALID_VALUE;
        if (current + 1 < attribute_count && attributes_from[current + 1] == i) current++;
        requests[i] = {destinations[i], sources[i], sizes[i], SourceOrder{attributes[current].order}};
    }
    return submit_copies(requests, ANY_KIND, stream, false, true);
}

// --------------------------------------------------------------------------------------------------------- other work

int fill(void *pointer, uint32_t value, size_t width, size_t count, StreamHandle on) {
    Lock lock(state.mutex);
    auto stream = stream_to_use(lock, on);
    if (!stream) return INVALID_HANDLE;
    if (!count) return SUCCESS;
    if (!is_allocated(lock, pointer, width * count)) return INVALID_VALUE;
    Operation operation;
    operation.kind = MEMSET;
    operation.bytes = width * count;
    operation.action = [memory = shadow(pointer), value, width, count] {
        for (size_t i = 0; i < count; i++) memcpy(memory + i * width, &value, width);
        return SUCCESS;
    };
    submit(lock, stream, std::move(operation));
    return SUCCESS;
}

int call_host(StreamHandle on, void (*function)(void *), void *argument) {
    Lock lock(state.mutex);
    auto stream = stream_to_use(lock, on);
    if (!stream) return INVALID_HANDLE;
    if (!function) return INVALID_VALUE;
    Operation operation;
    operation.kind = HOSTFN;
    operation.action = [function, argument] {
        in_host_function = true;
        function(argument);
        in_host_function = false;
        return SUCCESS;
    };
    submit(lock, stream, std::move(operation));
    return SUCCESS;
}

int launch_kernel(StreamHandle on, const char *name, std::function<int()> effect) {
    Lock lock(state.mutex);
    auto stream = stream_to_use(lock, on);
    if (!stream) return INVALID_HANDLE;
    if (!effect && !state.settings.ignore_kernels) {
        refuse(name);
        return NOT_SUPPORTED;
    }
    Operation operation;
    operation.kind = KERNEL;
    operation.action = std::move(effect);
    submit(lock, stream, std::move(operation));
    return SUCCESS;
}

}  // namespace cuda_emulator
