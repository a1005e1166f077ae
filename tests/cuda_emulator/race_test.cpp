// Many threads use the driver API at once, for ThreadSanitizer, AddressSanitizer and UBSan (`make sanitize`).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include <cuda.h>

extern "C" void cudaemu_set_bandwidth(double gb_s);
extern "C" void cudaemu_set_shared_bandwidth(double fraction);
extern "C" void cudaemu_set_unregister_waits(int on);
extern "C" void cudaemu_set_jitter(double us, uint64_t seed);
extern "C" void cudaemu_set_poison(int on);
extern "C" int cudaemu_hold(uintptr_t stream);
extern "C" int cudaemu_step(uintptr_t stream, uint64_t count);
extern "C" int cudaemu_release(uintptr_t stream);
extern "C" int cudaemu_reset(void);
extern "C" uint64_t cudaemu_violations(void);

static constexpr int THREADS = 4;
static constexpr int STREAMS = 3;
static constexpr int ROUNDS = 400;
static constexpr int ROUNDS_OF_A_STREAM = 50;
static constexpr int ROUNDS_OF_A_HOLD = 20;
static constexpr size_t BYTES = 64 << 10;
static constexpr size_t PAGE = 4096;
static constexpr size_t PIECES = 16;
static constexpr double JITTER_US = 20;
static constexpr double BANDWIDTH_GB_S = 5;

static void require(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "race_test: %s\n", what);
    exit(1);
}

#define CHECK(call) require((call) == CUDA_SUCCESS, #call)

// Bytes go to the device in one batch on one stream and back on another one, ordered by an event.
static void exchange(CUcontext context, unsigned seed) {
    std::mt19937 random(seed);
    CHECK(cuCtxPushCurrent(context));
    CUstream streams[STREAMS];
    for (CUstream &stream : streams) CHECK(cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, 0));
    CUdeviceptr device;
    CHECK(cuMemAlloc(&device, BYTES));
    char *host;
    bool is_registered = seed % 2;  // else allocated by the driver
    if (is_registered) {
        host = static_cast<char *>(aligned_alloc(PAGE, BYTES));
        CHECK(cuMemHostRegister(host, BYTES, 0));
    } else {
        CHECK(cuMemHostAlloc(reinterpret_cast<void **>(&host), BYTES, 0));
    }
    CUevent event;
    CHECK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));

    CUmemcpyAttributes attributes{};
    attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    size_t attributes_from = 0;
    CUdeviceptr to[PIECES], from[PIECES];
    size_t sizes[PIECES];
    for (size_t i = 0; i < PIECES; i++) {
        to[i] = device + i * (BYTES / PIECES);
        from[i] = reinterpret_cast<CUdeviceptr>(host) + i * (BYTES / PIECES);
        sizes[i] = BYTES / PIECES;
    }

    for (int round = 0; round < ROUNDS; round++) {
        CUstream &out = streams[random() % STREAMS];
        CUstream &back = streams[random() % STREAMS];
        memset(host, round, BYTES);
        bool hold = round % ROUNDS_OF_A_HOLD == 0;
        if (hold) cudaemu_hold(reinterpret_cast<uintptr_t>(out));
        CHECK(cuMemcpyBatchAsync(to, from, sizes, PIECES, &attributes, &attributes_from, 1, out));
        CHECK(cuEventRecord(event, out));
        CHECK(cuStreamWaitEvent(back, event, 0));
        CHECK(cuMemcpyDtoHAsync(host, device, BYTES, back));
        CHECK(cuEventRecord(event, back));
        if (hold) {
            cudaemu_step(reinterpret_cast<uintptr_t>(out), 1);
            cudaemu_release(reinterpret_cast<uintptr_t>(out));
        }
        CUresult query = cuEventQuery(event);
        require(query == CUDA_SUCCESS || query == CUDA_ERROR_NOT_READY, "an event's answer");
        CHECK(cuEventSynchronize(event));
        require(host[0] == static_cast<char>(round) && host[BYTES - 1] == static_cast<char>(round), "bytes");
        if (round % ROUNDS_OF_A_STREAM == 0) {
            CHECK(cuStreamDestroy(out));
            CHECK(cuStreamCreate(&out, CU_STREAM_NON_BLOCKING));
        }
    }

    for (CUstream stream : streams) {
        CHECK(cuStreamSynchronize(stream));
        CHECK(cuStreamDestroy(stream));
    }
    CHECK(cuEventDestroy(event));
    if (is_registered) {
        CHECK(cuMemHostUnregister(host));
        free(host);
    } else {
        CHECK(cuMemFreeHost(host));
    }
    CHECK(cuMemFree(device));
    CHECK(cuCtxPopCurrent(nullptr));
}

int main() {
    CHECK(cuInit(0));
    CUcontext context;
    CHECK(cuDevicePrimaryCtxRetain(&context, 0));
    cudaemu_set_jitter(JITTER_US, 1);
    cudaemu_set_bandwidth(BANDWIDTH_GB_S);
    cudaemu_set_shared_bandwidth(0.5);
    cudaemu_set_unregister_waits(1);
    cudaemu_set_poison(1);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < THREADS; i++) threads.emplace_back(exchange, context, i);
    for (std::thread &thread : threads) thread.join();
    require(cudaemu_violations() == 0, "violations");
    require(cudaemu_reset() == 0, "a reset");
    puts("race_test: all right");
}
