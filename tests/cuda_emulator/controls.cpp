// What tests set and ask, as C functions for ctypes (see __init__.py), and what those settings mean to the engine.
#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace cuda_emulator {

namespace {

// A reset waits no longer than this for what is queued: only an operation that never ends takes as long.
constexpr std::chrono::seconds PATIENCE{30};

constexpr int CONTROL_DONE = 0;
constexpr int CONTROL_REFUSED = 1;

}  // namespace

int injected_error(const Lock &, const std::string &point, bool asynchronous) {
    for (Rule &rule : state.rules)
        if (rule.asynchronous == asynchronous && rule.countdown > 0 && rule.point == point && --rule.countdown == 0)
            return rule.code;
    return SUCCESS;
}

void add_rules(State &to, const char *text) {
    std::string rest(text ? text : "");
    while (!rest.empty()) {
        size_t end = std::min(rest.find(';'), rest.size());
        std::string rule = rest.substr(0, end);
        rest.erase(0, end + 1);
        char point[64];
        char how[16] = "";
        long nth;
        int code;
        if (sscanf(rule.c_str(), " %63[^@]@%ld=%d:%15s", point, &nth, &code, how) >= 3)
            to.rules.push_back({point, nth, code, !strcmp(how, "async")});
        else fprintf(stderr, "[cuda emulator] CUDAEMU_FAIL: \"%s\" is not point@nth=code[:async]\n", rule.c_str());
    }
}

void add_violation(const Lock &, const char *format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    state.violations.emplace_back(text);
    fprintf(stderr, "[cuda emulator] VIOLATION: %s\n", text);
}

void refuse(const char *name) { fprintf(stderr, "[cuda emulator] %s is not emulated\n", name); }

bool is_hidden(const char *symbol) {
    Lock lock(state.mutex);
    return state.hidden.count(symbol) > 0;
}

}  // namespace cuda_emulator

// ----------------------------------------------------------------------------------------------------- for __init__.py

using namespace cuda_emulator;

extern "C" {

// Called by the generated stubs.
int cudaemu_refuse(const char *name) {
    if (is_forked()) return NOT_INITIALIZED;
    refuse(name);
    return NOT_SUPPORTED;
}

int cudaemu_is_forked(void) { return is_forked(); }

void cudaemu_set_delay(int kind, double us) {
    Lock lock(state.mutex);
    if (kind >= 0) state.settings.delay_us[kind] = us;
    else std::fill(state.settings.delay_us, state.settings.delay_us + OTHER, us);
}

int cudaemu_set_stream_delay(uintptr_t handle, double us) {
    Lock lock(state.mutex);
    auto stream = find_stream(lock, StreamHandle{handle});
    if (!stream) return CONTROL_REFUSED;
    stream->delay_us = us;
    return CONTROL_DONE;
}

void cudaemu_set_bandwidth(double gb_s) {
    Lock lock(state.mutex);
    state.settings.bandwidth_gb_s = gb_s;
}

void cudaemu_set_shared_bandwidth(double fraction) {
    Lock lock(state.mutex);
    state.settings.shared_bandwidth = fraction;
    state.hurry.notify_all();
}

void cudaemu_set_jitter(double us, uint64_t seed) {
    Lock lock(state.mutex);
    state.settings.jitter_us = us;
    state.random.seed(seed);
}

void cudaemu_set_poison(int on) {
    Lock lock(state.mutex);
    state.settings.poison = on != 0;
}

void cudaemu_ignore_kernels(int on) {
    Lock lock(state.mutex);
    state.settings.ignore_kernels = on != 0;
}

void cudaemu_hold_new_streams(int on) {
    Lock lock(state.mutex);
    state.settings.hold_new_streams = on != 0;
}

void cudaemu_set_unregister_waits(int on) {
    Lock lock(state.mutex);
    state.settings.unregister_waits = on != 0;
}

int cudaemu_hold(uintptr_t handle) {
    Lock lock(state.mutex);
    auto stream = find_stream(lock, StreamHandle{handle});
    if (!stream) return CONTROL_REFUSED;
    stream->held = true;
    stream->steps = 0;
    wake_workers(lock);  // a copy engine may have waited for this stream's turn
    return CONTROL_DONE;
}

int cudaemu_step(uintptr_t handle, uint64_t count) {
    Lock lock(state.mutex);
    auto stream = find_stream(lock, StreamHandle{handle});
    if (!stream || !stream->held) return CONTROL_REFUSED;
    stream->steps += count;
    wake_workers(lock);
    return CONTROL_DONE;
}

int cudaemu_release(uintptr_t handle) {
    Lock lock(state.mutex);
    auto stream = find_stream(lock, StreamHandle{handle});
    if (!stream) return CONTROL_REFUSED;
    stream->held = false;
    stream->steps = 0;
    wake_workers(lock);
    return CONTROL_DONE;
}

int64_t cudaemu_pending(uintptr_t handle) {
    Lock lock(state.mutex);
    auto stream = find_stream(lock, StreamHandle{handle});
    return stream ? static_cast<int64_t>(stream->submitted - stream->finished) : -1;
}

void cudaemu_inject(const char *point, long nth, int code, int asynchronous) {
    Lock lock(state.mutex);
    state.rules.push_back({point, nth, code, asynchronous != 0});
}

void cudaemu_set_attribute(int attribute, int value) {
    Lock lock(state.mutex);
    state.settings.attributes[attribute] = value;
}

void cudaemu_hide(const char *symbol) {
    Lock lock(state.mutex);
    state.hidden.insert(symbol);
}

int cudaemu_reset(void) {
    Lock lock(state.mutex);
    state.settings = state.defaults;
    state.random.seed(state.defaults.seed);
    state.rules.clear();
    state.hidden.clear();
    state.captures.clear();
    state.resets++;
    for (auto &[handle, stream] : state.streams) {
        stream->held = false;
        stream->steps = 0;
        stream->delay_us = -1;
        for (Operation &operation : stream->queue) operation.injected = SUCCESS;
    }
    state.hurry.notify_all();
    wake_workers(lock);
    // What is queued ends before anything is forgotten: its errors and violations belong to the test that is over.
    bool all_idle = state.finished.wait_for(lock, PATIENCE, [&] {
        return std::all_of(state.streams.begin(), state.streams.end(),
                           [&](const auto &entry) { return is_idle(lock, *entry.second); });
    });
    state.sticky = SUCCESS;
    state.violations.clear();
    state.calls.clear();
    std::fill(state.copied, state.copied + KINDS, CopyCount{});
    state.pageable_copies = 0;
    return all_idle ? CONTROL_DONE : CONTROL_REFUSED;
}

int cudaemu_sticky(void) { return sticky_error(); }

uint64_t cudaemu_violations(void) {
    Lock lock(state.mutex);
    return state.violations.size();
}

int cudaemu_violation_text(uint64_t index, char *text, size_t size) {
    Lock lock(state.mutex);
    if (index >= state.violations.size()) return CONTROL_REFUSED;
    snprintf(text, size, "%s", state.violations[index].c_str());
    return CONTROL_DONE;
}

uint64_t cudaemu_count(const char *api) {
    Lock lock(state.mutex);
    auto found = state.calls.find(api);
    return found == state.calls.end() ? 0 : found->second;
}

void cudaemu_copies(int kind, uint64_t *entries, uint64_t *bytes) {
    Lock lock(state.mutex);
    *entries = state.copied[kind].entries;
    *bytes = state.copied[kind].bytes;
}

uint64_t cudaemu_copies_pageable(void) {
    Lock lock(state.mutex);
    return state.pageable_copies;
}

int cudaemu_peek(const void *device_pointer, void *to, size_t bytes) {
    if (!is_allocated(device_pointer, bytes)) return CONTROL_REFUSED;
    memcpy(to, shadow(device_pointer), bytes);
    return CONTROL_DONE;
}

int cudaemu_poke(void *device_pointer, const void *from, size_t bytes) {
    if (!is_allocated(device_pointer, bytes)) return CONTROL_REFUSED;
    memcpy(shadow(device_pointer), from, bytes);
    return CONTROL_DONE;
}

}  // extern "C"
