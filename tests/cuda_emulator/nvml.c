// libnvidia-ml.so.1: enough of NVML for torch and vLLM to find as many devices as the emulator has.
#include <stdio.h>
#include <stdlib.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3 };

// A device's handle is its number behind this one.
#define FIRST_HANDLE 0x1000L
#define DRIVER_VERSION 13000

struct memory {
    unsigned long long total, free, used;
};

static unsigned long long environment(const char *name, unsigned long long otherwise) {
    const char *value = getenv(name);
    return value && *value ? strtoull(value, NULL, 10) : otherwise;
}

static unsigned device_count(void) { return (unsigned)environment("CUDAEMU_DEVICES", 1); }

static int device(long index, void **handle) {
    if (index < 0 || index >= (long)device_count()) return INVALID_ARGUMENT;
    *handle = (void *)(FIRST_HANDLE + index);
    return SUCCESS;
}

int nvmlInit(void) { return SUCCESS; }

int nvmlInit_v2(void) { return SUCCESS; }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    return SUCCESS;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) { return code ? "not supported" : "success"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    snprintf(text, size, "580.00.00");
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion(int *version) {
    *version = DRIVER_VERSION;
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }

int nvmlDeviceGetCount(unsigned *count) {
    *count = device_count();
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) { return nvmlDeviceGetCount(count); }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { return device((long)index, handle); }

// Device n has the bus n + 1: see cudaDeviceGetPCIBusId.
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **handle) {
    unsigned domain, bus;
    if (sscanf(id, "%x:%x", &domain, &bus) != 2) return INVALID_ARGUMENT;
    return device((long)bus - 1, handle);
}

int nvmlDeviceGetIndex(void *handle, unsigned *index) {
    *index = (unsigned)((long)handle - FIRST_HANDLE);
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    (void)handle;
    snprintf(text, size, "Emulated CUDA device");
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    snprintf(text, size, "GPU-e0e0e0e0-e0e0-e0e0-e0e0-%012lx", (long)handle);
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    (void)handle;
    *major = 9;
    *minor = 0;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
    (void)handle;
    memory->total = memory->free = environment("CUDAEMU_MEM_MB", 8192) << 20;
    memory->used = 0;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, void *processes) {
    (void)handle, (void)processes;
    *count = 0;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, void *processes) {
    return nvmlDeviceGetComputeRunningProcesses(handle, count, processes);
}

// torch looks these up by name and does without them.
int nvmlDeviceGetNvLinkRemoteDeviceType(void *handle, unsigned link, int *type) {
    (void)handle, (void)link, (void)type;
    return NOT_SUPPORTED;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *handle, unsigned link, void *info) {
    (void)handle, (void)link, (void)info;
    return NOT_SUPPORTED;
}

int nvmlDeviceGetGpuFabricInfoV(void *handle, void *info) {
    (void)handle, (void)info;
    return NOT_SUPPORTED;
}
