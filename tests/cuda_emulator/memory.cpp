// Device memory, and which ranges of host memory are pinned.
#include "engine.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

namespace cuda_emulator {

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t ALIGNMENT = 512;  // cudaMalloc promises 256

size_t round_up(size_t number, size_t to) { return (number + to - 1) / to * to; }

// Which device an address belongs to. Windows never move once CUDA is initialized, so this needs no lock.
bool locate(const void *pointer, int *device, size_t *offset) {
    const char *address = static_cast<const char *>(pointer);
    for (size_t i = 0; i < state.devices.size(); i++) {
        const char *window = state.devices[i].window;
        if (address >= window && address < window + state.memory_bytes) {
            *device = static_cast<int>(i);
            *offset = static_cast<size_t>(address - window);
            return true;
        }
    }
    return false;
}

// The allocation that begins at or before an offset, if the offset lies in it.
bool containing(const Device &device, size_t offset, size_t *base, size_t *bytes) {
    auto next = device.allocated.upper_bound(offset);
    if (next == device.allocated.begin()) return false;
    auto found = std::prev(next);
    *base = found->first;
    *bytes = found->second;
    return offset < *base + *bytes;
}

// The pinned range that an address lies in, or the end.
std::map<uintptr_t, Pinned>::iterator pinned_around(const Lock &, uintptr_t address) {
    auto next = state.pinned.upper_bound(address);
    if (next == state.pinned.begin()) return state.pinned.end();
    auto found = std::prev(next);
    return address < found->first + found->second.bytes ? found : state.pinned.end();
}

bool overlaps_pinned(const Lock &lock, uintptr_t address, size_t bytes) {
    auto next = state.pinned.lower_bound(address);
    if (next != state.pinned.end() && next->first < address + bytes) return true;
    return pinned_around(lock, address) != state.pinned.end();
}

// Whether every page of a range is mapped, and writable unless it need not be.
bool is_mapped(uintptr_t address, size_t bytes, bool read_only_is_enough) {
    FILE *maps = fopen("/proc/self/maps", "r");
    if (!maps) return true;
    uintptr_t reached = address;
    uintptr_t end = address + bytes;
    char line[512];
    while (reached < end && fgets(line, sizeof line, maps)) {
        unsigned long from, to;
        char access[8];
        if (sscanf(line, "%lx-%lx %7s", &from, &to, access) != 3) continue;
        if (from > reached || reached >= to) continue;
        if (access[0] != 'r' || (access[1] != 'w' && !read_only_is_enough)) break;
        reached = to;
    }
    fclose(maps);
    return reached >= end;
}

// EBUSY: locked into memory; 0: not locked; ENOMEM: nothing is mapped. The call does nothing but tell.
int mapping_at(uintptr_t address) {
    return msync(reinterpret_cast<void *>(address / PAGE * PAGE), PAGE, MS_INVALIDATE) ? errno : 0;
}

// A mapping is marked by locking it into memory, on a page's first use: what is mapped there later is not locked. There
// is no mark, and nothing is noticed, where a process may lock no more, or where pages are always locked (huge ones).
bool mark(uintptr_t address, size_t bytes) {
    return !mlock2(reinterpret_cast<void *>(address), bytes, MLOCK_ONFAULT) && mapping_at(address) == EBUSY &&
           mapping_at(address + bytes - 1) == EBUSY;
}

// Undoes it, but for pages that another registration has a part of.
void unmark(const Lock &lock, uintptr_t address, size_t bytes) {
    uintptr_t begin = address / PAGE * PAGE;
    uintptr_t end = round_up(address + bytes, PAGE);
    if (overlaps_pinned(lock, begin, PAGE)) begin += PAGE;
    if (end > begin && overlaps_pinned(lock, end - PAGE, PAGE)) end -= PAGE;
    if (end > begin) munlock(reinterpret_cast<void *>(begin), end - begin);
}

// A copy that still has to read or write a range of host memory; null: none.
const Copy *copy_in_flight(const Lock &, uintptr_t address, size_t bytes) {
    auto touches = [&](const void *pointer, size_t size) {
        uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
        return at < address + bytes && address < at + size;
    };
    for (auto &[handle, stream] : state.streams)
        for (const Operation &operation : stream->queue)
            for (const Copy &copy : operation.copies)
                if (touches(copy.destination, copy.bytes) || (!copy.staged && touches(copy.source, copy.bytes)))
                    return &copy;
    return nullptr;
}

// A range is about to vanish.
void check_not_in_flight(const Lock &lock, uintptr_t address, size_t bytes, const char *doing) {
    if (const Copy *copy = copy_in_flight(lock, address, bytes))
        add_violation(lock, "%s of %#lx (%zu bytes) with a copy of %zu bytes in flight", doing, address, bytes,
                      copy->bytes);
}

// The registration that begins at an address, or the end.
std::map<uintptr_t, Pinned>::iterator registered_at(const Lock &, const void *pointer) {
    auto found = state.pinned.find(reinterpret_cast<uintptr_t>(pointer));
    return found == state.pinned.end() || found->second.ours ? state.pinned.end() : found;
}

}  // namespace

// ----------------------------------------------------------------------------------------------------- device memory

bool is_device_pointer(const void *pointer) {
    int device;
    size_t offset;
    return locate(pointer, &device, &offset);
}

char *shadow(const void *device_pointer) {
    int device;
    size_t offset;
    return locate(device_pointer, &device, &offset) ? state.devices[device].memory + offset : nullptr;
}

bool is_allocated(const Lock &, const void *device_pointer, size_t bytes) {
    int device;
    size_t offset, base, size;
    return locate(device_pointer, &device, &offset) && containing(state.devices[device], offset, &base, &size) &&
           bytes <= base + size - offset;
}

bool is_allocated(const void *device_pointer, size_t bytes) {
    Lock lock(state.mutex);
    return is_allocated(lock, device_pointer, bytes);
}

int allocate(size_t bytes, void **pointer) {
    Lock lock(state.mutex);
    if (!bytes) return INVALID_VALUE;
    if (bytes > state.memory_bytes) return OUT_OF_MEMORY;
    Device &device = state.devices[current_device()];
    size_t size = round_up(bytes, ALIGNMENT);
    size_t offset = ALIGNMENT;  // the first bytes stay free: an allocation never begins where a window does
    for (auto &[other, other_bytes] : device.allocated) {
        if (other >= offset + size) break;  // the gap before it is large enough
        offset = round_up(other + other_bytes, ALIGNMENT);
    }
    if (offset + size > state.memory_bytes) return OUT_OF_MEMORY;
    device.allocated[offset] = bytes;
    *pointer = device.window + offset;
    return SUCCESS;
}

int release(void *pointer) {
    Lock lock(state.mutex);
    int number;
    size_t offset;
    if (!locate(pointer, &number, &offset)) return INVALID_VALUE;
    Device &device = state.devices[number];
    auto found = device.allocated.find(offset);
    if (found == device.allocated.end()) return INVALID_VALUE;
    // Pages that lie wholly inside go back to the system.
    size_t from = round_up(offset, PAGE);
    size_t to = (offset + found->second) / PAGE * PAGE;
    if (to > from) madvise(device.memory + from, to - from, MADV_REMOVE);
    device.allocated.erase(found);
    return SUCCESS;
}

bool find_allocation(const void *pointer, void **base, size_t *bytes, int *device) {
    Lock lock(state.mutex);
    int number;
    size_t offset, start, size;
    if (!locate(pointer, &number, &offset) || !containing(state.devices[number], offset, &start, &size)) return false;
    if (base) *base = state.devices[number].window + start;
    if (bytes) *bytes = size;
    if (device) *device = number;
    return true;
}

size_t total_memory() { return state.memory_bytes; }

size_t free_memory(int device) {
    Lock lock(state.mutex);
    size_t used = 0;
    for (auto &[offset, bytes] : state.devices[device].allocated) used += bytes;
    return state.memory_bytes - used;
}

// ------------------------------------------------------------------------------------------------------- host memory

HostRange host_range(const Lock &lock, const void *pointer, size_t bytes) {
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    uintptr_t end = address + bytes;
    if (!overlaps_pinned(lock, address, bytes)) return HostRange::PAGEABLE;
    bool apart = false;
    for (auto found = pinned_around(lock, address); found != state.pinned.end(); apart = true) {
        address = found->first + found->second.bytes;
        if (address >= end) return apart ? HostRange::PINNED_APART : HostRange::PINNED;
        found = pinned_around(lock, address);
    }
    return HostRange::MIXED;
}

bool is_registered(const Lock &lock, const void *pointer) {
    auto found = pinned_around(lock, reinterpret_cast<uintptr_t>(pointer));
    return found != state.pinned.end() && !found->second.ours;
}

bool find_pinned(const void *pointer, void **base, size_t *bytes) {
    Lock lock(state.mutex);
    auto found = pinned_around(lock, reinterpret_cast<uintptr_t>(pointer));
    if (found == state.pinned.end()) return false;
    if (base) *base = reinterpret_cast<void *>(found->first);
    if (bytes) *bytes = found->second.bytes;
    return true;
}

bool is_mapped_anew(const Lock &lock, const void *pointer, size_t bytes) {
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    auto found = pinned_around(lock, address);
    if (found == state.pinned.end() || !found->second.marked) return false;
    uintptr_t end = std::min(address + bytes, found->first + found->second.bytes);
    return !mapping_at(address) || !mapping_at(end - 1);
}

int register_host(void *pointer, size_t bytes, unsigned flags) {
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (!address || !bytes || address + bytes < address || is_device_pointer(pointer)) return INVALID_VALUE;
    if (!is_mapped(address, bytes, flags & HOST_REGISTER_READ_ONLY)) return INVALID_VALUE;
    Lock lock(state.mutex);
    if (overlaps_pinned(lock, address, bytes)) return ALREADY_REGISTERED;
    state.pinned[address] = {bytes, false, mark(address, bytes)};
    return SUCCESS;
}

// It may wait for the device, but not under a copy of the range: a program may count on neither.
int unregister_host(void *pointer) {
    if (!pointer) return INVALID_VALUE;
    Lock lock(state.mutex);
    auto found = registered_at(lock, pointer);
    if (found == state.pinned.end()) return NOT_REGISTERED;
    if (state.settings.unregister_waits && !copy_in_flight(lock, found->first, found->second.bytes)) {
        lock.unlock();
        if (int error = synchronize_device()) return error;
        lock.lock();
        found = registered_at(lock, pointer);  // another thread may have been here
        if (found == state.pinned.end()) return NOT_REGISTERED;
    }
    check_not_in_flight(lock, found->first, found->second.bytes, "host unregister");
    Pinned range = found->second;
    state.pinned.erase(found);
    if (range.marked) unmark(lock, reinterpret_cast<uintptr_t>(pointer), range.bytes);
    return SUCCESS;
}

int allocate_host(size_t bytes, void **pointer) {
    *pointer = nullptr;
    if (!bytes) return SUCCESS;
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    Lock lock(state.mutex);
    state.pinned[reinterpret_cast<uintptr_t>(memory)] = {bytes, true, false};
    *pointer = memory;
    return SUCCESS;
}

int free_host(void *pointer) {
    if (!pointer) return SUCCESS;
    Lock lock(state.mutex);
    auto found = state.pinned.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == state.pinned.end() || !found->second.ours) return INVALID_VALUE;
    check_not_in_flight(lock, found->first, found->second.bytes, "host free");
    munmap(pointer, found->second.bytes);
    state.pinned.erase(found);
    return SUCCESS;
}

int move_host(char *destination, const char *source, size_t bytes) {
    // The kernel copies within our own process and answers EFAULT where memcpy would end the process.
    while (bytes) {
        iovec to{destination, bytes};
        iovec from{const_cast<char *>(source), bytes};
        ssize_t moved = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
        if (moved < 0 && errno == EFAULT) return ILLEGAL_ADDRESS;
        if (moved < 0) {  // the call is forbidden here: without its protection then
            memcpy(destination, source, bytes);
            return SUCCESS;
        }
        destination += moved;
        source += moved;
        bytes -= static_cast<size_t>(moved);
    }
    return SUCCESS;
}

}  // namespace cuda_emulator
