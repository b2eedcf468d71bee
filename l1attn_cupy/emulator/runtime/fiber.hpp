// fiber.hpp: one CUDA thread as one fiber - a stack, a saved stack pointer, and what the thread waits for.
//
// swapcontext() makes a system call per switch (the signal mask); the dozen instructions below do not.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <mutex>
#include <new>
#include <vector>

#include "abi.hpp"

extern "C" void emu_switch(void** save, void* load);  // saves this stack's pointer, continues on `load`

#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, . - emu_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, %function
emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emu_switch, . - emu_switch
)");
#else
#error "the emulator's context switch is written for x86-64 and aarch64"
#endif

namespace emu {

struct Worker;

enum class State : uint8_t { ready, at_barrier, at_warp, ended };

struct alignas(64) Fiber {
  Worker* worker;
  void* stack_pointer;
  uint32_t thread;       // threadIdx.x
  uint32_t tick;         // see shadow.hpp: rises at each synchronisation
  const EmuSite* site;   // from here on: what it waits for
  uint64_t value;        // given to the other threads, then replaced by what the operation returns
  uint32_t mask;
  State state;
  uint8_t op, vote;      // EmuWarpOp, EmuVote
  uint8_t source_lane;

  uint32_t lane() const { return thread & 31u; }
  uint32_t warp() const { return thread >> 5; }
};
static_assert(sizeof(Fiber) == 64, "one cache line");

constexpr size_t kStackBytes = 128 * 1024;  // a power of two: stacks are aligned to their size
constexpr size_t kGuardBytes = 16 * 1024;   // at the low end, inaccessible; a multiple of any page size in use

// Near the top of each stack lies a pointer to its fiber, so that any code on the stack finds it from the stack pointer
// alone: a thread-local lookup would cost more than the check that needs it. Stacks begin at different places of a
// page, or all of them would contend for the same few lines of the cache.
inline __attribute__((always_inline)) Fiber** fiber_slot(const void* on_its_stack) {
  const uintptr_t low = reinterpret_cast<uintptr_t>(on_its_stack) & ~(kStackBytes - 1);
  const uintptr_t step = low / kStackBytes % 32 * 128;
  return reinterpret_cast<Fiber**>(low + kStackBytes - 64 - step);
}

inline __attribute__((always_inline)) Fiber* this_fiber() { return *fiber_slot(__builtin_frame_address(0)); }

inline __attribute__((always_inline)) bool on_this_stack(uintptr_t address) {
  return (address ^ reinterpret_cast<uintptr_t>(__builtin_frame_address(0))) < kStackBytes;
}

// The stacks of one block. Made once, then handed from launch to launch: a guard page costs a system call.
class StackArena {
 public:
  static StackArena* borrow(unsigned count);
  void give_back();

  char* low_end(unsigned i) const { return base_ + i * kStackBytes; }
  unsigned count() const { return count_; }
  bool contains(const void* p) const {
    return static_cast<size_t>(static_cast<const char*>(p) - base_) < count_ * kStackBytes;
  }
  bool in_guard(const void* p) const {
    return contains(p) && (static_cast<const char*>(p) - base_) % kStackBytes < kGuardBytes;
  }

 private:
  explicit StackArena(unsigned count);
  char* base_;
  unsigned count_;
};

inline std::mutex& arena_mutex() { static std::mutex m; return m; }
inline std::vector<StackArena*>& idle_arenas() { static std::vector<StackArena*> v; return v; }

inline StackArena::StackArena(unsigned count) : base_(nullptr), count_(count) {
  const size_t bytes = (count + 1) * kStackBytes;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  base_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + kStackBytes - 1) & ~(kStackBytes - 1));
  for (unsigned i = 0; i < count; ++i)
    if (mprotect(low_end(i), kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
}

inline StackArena* StackArena::borrow(unsigned count) {
  std::lock_guard<std::mutex> lock(arena_mutex());
  auto& idle = idle_arenas();
  for (size_t i = 0; i < idle.size(); ++i)
    if (idle[i]->count_ >= count) {
      StackArena* arena = idle[i];
      idle.erase(idle.begin() + static_cast<ptrdiff_t>(i));
      return arena;
    }
  return new StackArena(count);
}

inline void StackArena::give_back() {
  std::lock_guard<std::mutex> lock(arena_mutex());
  idle_arenas().push_back(this);
}

// Prepares a stack so that the first switch to `f` calls `start` there.
inline void prepare(Fiber* f, char* stack, void (*start)()) {
  Fiber** slot = fiber_slot(stack);
  *slot = f;
  auto* top = reinterpret_cast<void**>(slot);
#if defined(__x86_64__)
  *--top = nullptr;                            // in place of start's return address: rsp is 8 modulo 16
  *--top = reinterpret_cast<void*>(start);     // what emu_switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // rbp rbx r12..r15
#else
  top -= 160 / sizeof(void*);
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[11] = reinterpret_cast<void*>(start);    // x30
#endif
  f->stack_pointer = top;
}

}  // namespace emu
