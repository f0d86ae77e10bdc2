// Runs the bodies of CUDA kernels on a CPU, so that tests run the shipped sources without a GPU.
//
// Every CUDA thread is a fiber with a stack of its own. The threads of one block run in turns on
// one OS thread: each goes on until it waits at a barrier or in a warp collective, or returns.
// Blocks are spread over OpenMP threads. A kernel that is right gives the same result in any order
// of turns; there are four (CUDA_ON_CPU_ORDER=0..3, or bt_emulation_order), and tests run in all of
// them: a missing barrier then shows in at least one. What was not written reads as NaN: shared
// memory is filled with ones before each block. A barrier that some threads of a block cannot reach
// ends the program with the lines where threads wait.
//
// Not shown: races between blocks, coalescing, occupancy, approximate intrinsics. Out-of-bounds
// accesses show under -fsanitize=address (of global and dynamic shared memory), misaligned vectors
// under -fsanitize=alignment. For tests only.
#pragma once

#if !defined(__x86_64__) || !defined(__GNUC__) || !defined(__linux__)
#error "cuda_on_cpu.h switches stacks in x86-64 assembly for g++ on Linux"
#endif

#include <link.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// -- words of the language ------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __restrict__ __restrict
// All blocks that an OS thread runs, one after the other, use the same variables.
#define __shared__ static thread_local

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// -- the runtime library, as far as kernels use it ------------------------------------------------

typedef void *cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

namespace cuda_on_cpu {
inline std::atomic<cudaError_t> last_error{cudaSuccess};
}

inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cuda_on_cpu::last_error.exchange(cudaSuccess); }
inline const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
  }
  return "unrecognized error code";
}
inline cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t) {
  memset(to, byte, bytes);
  return cudaSuccess;
}

namespace cuda_on_cpu {
constexpr size_t SHARED = 48 * 1024, MOST_SHARED = 227 * 1024;
inline std::map<const void *, size_t> shared_limit;  // of kernels that asked for one
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > cuda_on_cpu::MOST_SHARED) return cudaErrorInvalidValue;
  cuda_on_cpu::shared_limit[reinterpret_cast<const void *>(kernel)] = bytes;
  return cudaSuccess;
}

namespace cuda_on_cpu {

// -- stacks ---------------------------------------------------------------------------------------

// Keeps what a function must preserve on this stack, stores its pointer in *from, and goes on with
// the stack `to`, which was left in the same way. (noipa: the compiler may assume nothing of it.)
__attribute__((naked, noinline, noipa)) inline void switch_stack(void ** /*from*/, void * /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

// A stack for each thread of a block. Below each is a page that may not be touched.
class Stacks {
 public:
  static constexpr size_t SIZE = 128 * 1024;

  ~Stacks() { release(); }

  void reserve(size_t count) {
    if (count <= count_) return;
    release();
    void *memory = mmap(nullptr, count * STRIDE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) perror("cuda_on_cpu: mmap of stacks"), abort();
    memory_ = static_cast<char *>(memory);
    count_ = count;
    for (size_t i = 0; i < count; i++) mprotect(memory_ + i * STRIDE, GUARD, PROT_NONE);
  }

  char *bottom(size_t i) const { return memory_ + i * STRIDE + GUARD; }

 private:
  static constexpr size_t GUARD = 4096, STRIDE = SIZE + GUARD;

  void release() {
    if (memory_) munmap(memory_, count_ * STRIDE);
  }

  char *memory_ = nullptr;
  size_t count_ = 0;
};

// Tells the address sanitizer which stack is in use; nothing without it.
struct StackNote {
  void *fake = nullptr;
  const void *bottom = nullptr;
  size_t size = 0;

  // From the stack of this note to `to`, which is its owner's last time here if `for_good`.
  void leaving([[maybe_unused]] const StackNote &to, [[maybe_unused]] bool for_good = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, to.bottom, to.size);
#endif
  }
  // On the stack of this note again (or for the first time), coming from `from`.
  void arrived([[maybe_unused]] StackNote &from) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, &from.bottom, &from.size);
#endif
  }
};

// -- shared memory --------------------------------------------------------------------------------

constexpr int UNWRITTEN = 0xff;  // every byte: NaN as a number of any size, -1 as an integer

inline thread_local char some_shared_variable;

// The `__shared__` variables of this OS thread. Nothing else in a library of kernels is
// thread-local, so that they are the whole block of thread-local variables of that library.
class StaticShared {
 public:
  StaticShared() { dl_iterate_phdr(look_at, this); }

  void fill() { memset(begin_, UNWRITTEN, size_); }

 private:
  void *begin_ = nullptr;
  size_t size_ = 0;

  // Of one library of the process: is the variable that we know in its block?
  static int look_at(dl_phdr_info *library, size_t, void *found) {
    char *begin = static_cast<char *>(library->dlpi_tls_data), *known = &some_shared_variable;
    for (int i = 0; i < library->dlpi_phnum; i++) {
      const auto &header = library->dlpi_phdr[i];
      if (header.p_type != PT_TLS || known < begin || known >= begin + header.p_memsz) continue;
      auto *shared = static_cast<StaticShared *>(found);
      shared->begin_ = begin, shared->size_ = header.p_memsz;
      return 1;
    }
    return 0;
  }
};

// Exactly as large as asked for, so that the sanitizer sees what is behind it.
class DynamicShared {
 public:
  ~DynamicShared() { free(memory_); }

  void resize(size_t bytes) {
    if (bytes == size_) return;
    free(memory_);
    memory_ = nullptr;
    if (bytes && posix_memalign(&memory_, 128, bytes)) abort();
    size_ = bytes;
  }
  void *data() const { return memory_; }
  void fill() {
    if (size_) memset(memory_, UNWRITTEN, size_);
  }

 private:
  void *memory_ = nullptr;
  size_t size_ = 0;
};

// -- threads and blocks ---------------------------------------------------------------------------

constexpr unsigned WARP = 32;

enum class State { READY, IN_COLLECTIVE, AT_BARRIER, DONE };

struct Thread {
  void *stack_pointer;
  StackNote note;
  uint3 index;
  unsigned lane;
  State state;
  const char *file;  // where it waits
  int line;
  // What it brings to a collective of its warp, and takes from it.
  unsigned mask, source;
  uint64_t brought, received;
  unsigned votes;  // lanes that brought something other than zero
};

// 0 to 3. Bit 0: warps and blocks run from last to first; bit 1: lanes do.
inline std::atomic<int> order{getenv("CUDA_ON_CPU_ORDER") ? atoi(getenv("CUDA_ON_CPU_ORDER")) : 0};

class Block {
 public:
  uint3 index;
  dim3 size, grid;
  DynamicShared dynamic_shared;
  Thread *running;

  void run(const std::function<void()> &kernel) {
    kernel_ = &kernel;
    order_ = order;
    prepare();
    while (num_live_ > 0) {
      bool moved = false;
      for (unsigned k = 0; k < num_warps(); k++)
        moved |= run_warp(order_ & 1 ? num_warps() - 1 - k : k);
      if (!release_barrier() && !moved) stuck();
    }
  }

  // Called by the running thread: waits for the lanes of `mask`, which exchange what they bring.
  void collective(unsigned mask, uint64_t brought, unsigned source, const char *file, int line) {
    Thread &thread = *running;
    thread.file = file, thread.line = line;
    if (!(mask >> thread.lane & 1))
      fail("a lane is not in the mask of its collective", thread, thread);
    thread.mask = mask, thread.brought = brought, thread.source = source;
    wait(State::IN_COLLECTIVE);
  }

  void barrier(const char *file, int line) {
    running->file = file, running->line = line;
    wait(State::AT_BARRIER);
  }

 private:
  StaticShared static_shared_;
  std::vector<Thread> threads_;
  Stacks stacks_;
  const std::function<void()> *kernel_;
  void *scheduler_stack_;
  StackNote scheduler_note_;
  int order_;
  unsigned num_live_;

  unsigned num_warps() const { return (threads_.size() + WARP - 1) / WARP; }
  Thread *begin_of(unsigned warp) { return &threads_[warp * WARP]; }
  unsigned lanes_of(unsigned warp) const {
    const unsigned left = threads_.size() - warp * WARP;
    return left < WARP ? left : WARP;
  }

  void prepare() {
    static_shared_.fill();
    dynamic_shared.fill();
    num_live_ = size.x * size.y * size.z;
    threads_.assign(num_live_, Thread{});
    stacks_.reserve(num_live_);
    for (unsigned i = 0; i < num_live_; i++) {
      Thread &thread = threads_[i];
      thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
      thread.lane = i % WARP;
      thread.note.bottom = stacks_.bottom(i);
      thread.note.size = Stacks::SIZE;
      thread.stack_pointer = fresh_stack(stacks_.bottom(i) + Stacks::SIZE);
    }
  }

  // What switch_stack expects: six registers, where to go on, and where that would return to.
  static void *fresh_stack(char *top) {
    void **pointer = reinterpret_cast<void **>(top - 16);
    *--pointer = nullptr;
    *--pointer = reinterpret_cast<void *>(&Block::enter);
    for (int i = 0; i < 6; i++) *--pointer = nullptr;
    return pointer;
  }

  static void enter();  // the first function on the stack of a thread

  void body() {
    running->note.arrived(scheduler_note_);
    (*kernel_)();
    wait(State::DONE);
  }

  // The running thread gives its turn back, and goes on once it is READY and has the next one.
  void wait(State state) {
    Thread &thread = *running;
    thread.state = state;
    thread.note.leaving(scheduler_note_, state == State::DONE);
    switch_stack(&thread.stack_pointer, scheduler_stack_);
    thread.note.arrived(scheduler_note_);
  }

  void resume(Thread &thread) {
    StackNote ignored;
    running = &thread;
    scheduler_note_.leaving(thread.note);
    switch_stack(&scheduler_stack_, thread.stack_pointer);
    scheduler_note_.arrived(ignored);
    num_live_ -= thread.state == State::DONE;
  }

  // Runs the lanes of a warp until all of them wait for other warps, or are done.
  bool run_warp(unsigned warp) {
    bool moved = false;
    const unsigned lanes = lanes_of(warp);
    do {
      for (unsigned k = 0; k < lanes; k++) {
        Thread &thread = begin_of(warp)[order_ & 2 ? lanes - 1 - k : k];
        if (thread.state != State::READY) continue;
        resume(thread);
        moved = true;
      }
    } while (release_collective(warp));
    return moved;
  }

  // Lets lanes go on for whose masks all live lanes wait. A lane that does not exist, or has
  // returned, is not waited for.
  bool release_collective(unsigned warp) {
    Thread *const lane = begin_of(warp);
    const unsigned lanes = lanes_of(warp);
    unsigned live = 0;
    for (unsigned i = 0; i < lanes; i++) live |= unsigned(lane[i].state != State::DONE) << i;
    for (unsigned i = 0; i < lanes; i++) {
      if (lane[i].state != State::IN_COLLECTIVE) continue;
      const unsigned needed = lane[i].mask & live;
      unsigned there = 0;
      for (unsigned j = 0; j < lanes; j++) {
        const bool with = lane[j].state == State::IN_COLLECTIVE && lane[j].mask == lane[i].mask;
        there |= unsigned(with) << j;
      }
      if (needed & ~there) continue;
      exchange(lane, lanes, needed);
      return true;
    }
    return false;
  }

  void exchange(Thread *lane, unsigned lanes, unsigned members) {
    const Thread &first = lane[__builtin_ctz(members)];
    unsigned votes = 0;
    for (unsigned i = 0; i < lanes; i++) {
      if (!(members >> i & 1)) continue;
      if (differ(lane[i], first))
        fail("lanes of a warp meet in different collectives", first, lane[i]);
      votes |= unsigned(lane[i].brought != 0) << i;
    }
    for (unsigned i = 0; i < lanes; i++) {
      if (!(members >> i & 1)) continue;
      const unsigned source = lane[i].source;
      lane[i].received = members >> source & 1 ? lane[source].brought : ~uint64_t(0);
      lane[i].votes = votes;
      lane[i].state = State::READY;
    }
  }

  // As on hardware since Volta: threads that have returned are not waited for.
  bool release_barrier() {
    unsigned waiting = 0;
    const Thread *first = nullptr;
    for (const Thread &thread : threads_) {
      if (thread.state != State::AT_BARRIER) continue;
      waiting++;
      if (!first) first = &thread;
      if (differ(thread, *first)) fail("divergent __syncthreads", *first, thread);
    }
    if (waiting == 0 || waiting < num_live_) return false;
    for (Thread &thread : threads_)
      if (thread.state == State::AT_BARRIER) thread.state = State::READY;
    return true;
  }

  static bool differ(const Thread &a, const Thread &b) {
    return a.line != b.line || strcmp(a.file, b.file) != 0;
  }

  [[noreturn]] void stuck() {
    const Thread *first = nullptr, *other = nullptr;
    for (const Thread &thread : threads_) {
      if (thread.state == State::DONE) continue;
      if (!first) first = &thread;
      if (differ(thread, *first)) other = &thread;
    }
    fail("deadlock, threads wait for each other", *first, other ? *other : *first);
  }

  [[noreturn]] void fail(const char *what, const Thread &a, const Thread &b) {
    fprintf(stderr,
            "cuda_on_cpu: %s: thread (%u, %u, %u) at %s:%d, thread (%u, %u, %u) at %s:%d, "
            "block (%u, %u, %u)\n",
            what, a.index.x, a.index.y, a.index.z, a.file, a.line, b.index.x, b.index.y, b.index.z,
            b.file, b.line, index.x, index.y, index.z);
    abort();
  }
};

// The block that this OS thread runs. Its stacks serve one block after the other. Not thread_local,
// which is for shared memory.
inline Block &block() {
  static const pthread_key_t key = [] {
    pthread_key_t fresh;
    const auto forget = [](void *block) { delete static_cast<Block *>(block); };
    if (pthread_key_create(&fresh, forget)) abort();
    return fresh;
  }();
  void *block = pthread_getspecific(key);
  if (!block) {
    block = new Block();
    pthread_setspecific(key, block);
  }
  return *static_cast<Block *>(block);
}

inline void Block::enter() {
  block().body();
  abort();  // a thread that is done gets no more turns
}

inline cudaError_t check(const void *kernel, dim3 grid, dim3 size, size_t shared_bytes) {
  const unsigned long threads = 1ul * size.x * size.y * size.z;
  const bool possible = threads >= 1 && threads <= 1024 && size.z <= 64 && grid.x >= 1 &&
                        grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
                        grid.z <= 65535;
  if (!possible) return cudaErrorInvalidConfiguration;
  const auto limit = shared_limit.find(kernel);
  const size_t most = limit == shared_limit.end() ? SHARED : std::max(SHARED, limit->second);
  return shared_bytes <= most ? cudaSuccess : cudaErrorInvalidValue;
}

// kernel<<<grid, size, shared_bytes>>>(arguments...), and waits for it.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes,
            Arguments... arguments) {
  const auto error = check(reinterpret_cast<const void *>(kernel), grid, size, shared_bytes);
  if (error != cudaSuccess) {
    last_error = error;
    return;
  }
  const std::function<void()> body = [&] { kernel(arguments...); };
  const int64_t num_blocks = int64_t(grid.x) * grid.y * grid.z;
#pragma omp parallel for schedule(dynamic)
  for (int64_t k = 0; k < num_blocks; k++) {
    const int64_t i = order & 1 ? num_blocks - 1 - k : k;
    Block &here = block();
    here.grid = grid, here.size = size;
    here.index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                  unsigned(i / grid.x / grid.y)};
    here.dynamic_shared.resize(shared_bytes);
    here.run(body);
  }
}

// What lane `source` brings, to each lane of `mask`; all bits set if that lane does not take part.
template <typename T>
T exchange(unsigned mask, T value, unsigned source, const char *file, int line) {
  static_assert(sizeof(T) <= 8, "a lane passes 8 bytes at most");
  uint64_t brought = 0;
  memcpy(&brought, &value, sizeof value);
  block().collective(mask, brought, source, file, line);
  memcpy(&value, &block().running->received, sizeof value);
  return value;
}

// The lane that a shuffle reads, in groups of `width`; its own where it would leave the group.
inline unsigned lane_in_group(int position, int width) {
  const int lane = block().running->lane, first = lane & ~(width - 1);
  return position >= first && position < first + width ? position : lane;
}

}  // namespace cuda_on_cpu

// -- what kernels call ----------------------------------------------------------------------------

#define threadIdx (cuda_on_cpu::block().running->index)
#define blockIdx (cuda_on_cpu::block().index)
#define blockDim (cuda_on_cpu::block().size)
#define gridDim (cuda_on_cpu::block().grid)
constexpr int warpSize = cuda_on_cpu::WARP;

// As last parameters of a function: where it is called.
#define CUDA_ON_CPU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_CALLER) { cuda_on_cpu::block().barrier(file, line); }
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_CALLER) {
  cuda_on_cpu::block().collective(mask, 0, 0, file, line);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __threadfence(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_CALLER) {
  const int first = cuda_on_cpu::block().running->lane & ~(width - 1);
  return cuda_on_cpu::exchange(mask, value, first + (source & (width - 1)), file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_CALLER) {
  const int lane = cuda_on_cpu::block().running->lane, last = lane | (width - 1);
  const int source = (lane ^ bits) <= last ? lane ^ bits : lane;  // may read groups before its own
  return cuda_on_cpu::exchange(mask, value, source, file, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_CALLER) {
  const int source = cuda_on_cpu::lane_in_group(cuda_on_cpu::block().running->lane + by, width);
  return cuda_on_cpu::exchange(mask, value, source, file, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_CALLER) {
  const int source = cuda_on_cpu::lane_in_group(cuda_on_cpu::block().running->lane - by, width);
  return cuda_on_cpu::exchange(mask, value, source, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  cuda_on_cpu::block().collective(mask, predicate != 0, 0, file, line);
  return cuda_on_cpu::block().running->votes;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  return __ballot_sync(mask, predicate == 0, file, line) == 0;
}
inline unsigned __activemask() { return 1u << cuda_on_cpu::block().running->lane; }

namespace cuda_on_cpu {

// The old value; *address becomes change(old).
template <typename T, typename Change> T atomically(T *address, Change change) {
  T old, changed;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    changed = change(old);
  } while (!__atomic_compare_exchange(address, &old, &changed, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return old;
}

template <typename To, typename From> To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_on_cpu

template <typename T> T atomicAdd(T *address, T value) {
  return cuda_on_cpu::atomically(address, [=](T old) { return T(old + value); });
}
template <typename T> T atomicMax(T *address, T value) {
  return cuda_on_cpu::atomically(address, [=](T old) { return old > value ? old : value; });
}
template <typename T> T atomicOr(T *address, T value) {
  return cuda_on_cpu::atomically(address, [=](T old) { return T(old | value); });
}

inline unsigned __float_as_uint(float x) { return cuda_on_cpu::same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::same_bits<float>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::same_bits<double>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T> T __ldg(const T *address) { return *address; }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }

// Of floats the one that is not NaN, as on the device.
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
template <typename T> T max(T a, T b) { return a > b ? a : b; }
template <typename T> T min(T a, T b) { return a < b ? a : b; }

// -- half precision: to nearest even; NaN becomes 0x7fff, as on the device ------------------------

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };

inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }

inline float __half2float(__half x) { return cuda_on_cpu::same_bits<_Float16>(x.bits); }
inline __half __float2half_rn(float x) {
  if (x != x) return {0x7fff};
  return {cuda_on_cpu::same_bits<uint16_t>(_Float16(x))};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
