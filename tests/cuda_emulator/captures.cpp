// Captures of graphs, as far as they are in the way of other threads. A graph holds nothing: what is queued on a stream
// that captures runs.
#include "engine.h"

#include <algorithm>
#include <iterator>

namespace cuda_emulator {

namespace {

thread_local int thread_mode = CAPTURE_GLOBAL;

// What may be refused while somebody captures: calls that wait for work, ask whether it is done, or change what is
// mapped for the device.
const char *const UNSAFE[] = {"device_sync", "event_query",  "event_sync",    "free",
                              "host_alloc",  "host_free",    "host_register", "malloc",
                              "memcpy",      "stream_query", "stream_sync",   "host_unregister"};

bool is_unsafe(const std::string &api) {
    return std::find(std::begin(UNSAFE), std::end(UNSAFE), api) != std::end(UNSAFE);
}

bool is_prohibited_by(const Capture &capture) {
    if (thread_mode == CAPTURE_RELAXED) return false;
    if (capture.thread == std::this_thread::get_id()) return capture.mode != CAPTURE_RELAXED;
    return thread_mode == CAPTURE_GLOBAL && capture.mode == CAPTURE_GLOBAL;
}

}  // namespace

int check_captures(const Lock &, const std::string &api) {
    int error = SUCCESS;
    if (state.captures.empty() || !is_unsafe(api)) return error;
    for (auto &[stream, capture] : state.captures)
        if (is_prohibited_by(capture)) {
            capture.invalidated = true;
            error = CAPTURE_UNSUPPORTED;
        }
    return error;
}

int begin_capture(StreamHandle handle, int mode) {
    Lock lock(state.mutex);
    if (handle == LEGACY_STREAM || handle == LEGACY_STREAM_BY_NAME) return CAPTURE_UNSUPPORTED;
    if (!stream_to_use(lock, handle)) return INVALID_HANDLE;
    if (mode < CAPTURE_GLOBAL || mode > CAPTURE_RELAXED) return INVALID_VALUE;
    if (!state.captures.insert({handle, {std::this_thread::get_id(), mode, false}}).second) return ILLEGAL_STATE;
    return SUCCESS;
}

int end_capture(StreamHandle handle, uintptr_t *graph) {
    Lock lock(state.mutex);
    *graph = 0;
    auto found = state.captures.find(handle);
    if (found == state.captures.end()) return ILLEGAL_STATE;
    Capture capture = found->second;
    if (capture.mode != CAPTURE_RELAXED && capture.thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    state.captures.erase(found);
    if (capture.invalidated) return CAPTURE_INVALIDATED;
    *graph = state.next_handle += HANDLE_STEP;
    return SUCCESS;
}

CaptureStatus capture_status(StreamHandle handle) {
    Lock lock(state.mutex);
    auto found = state.captures.find(handle);
    if (found == state.captures.end()) return CaptureStatus::NONE;
    return found->second.invalidated ? CaptureStatus::INVALIDATED : CaptureStatus::ACTIVE;
}

int exchange_capture_mode(int *mode) {
    if (*mode < CAPTURE_GLOBAL || *mode > CAPTURE_RELAXED) return INVALID_VALUE;
    std::swap(*mode, thread_mode);
    return SUCCESS;
}

}  // namespace cuda_emulator
