// worker.hpp: a Run is one launch; a Worker is one OS thread of it, which runs blocks one after the other.
#pragma once

#include <pthread.h>
#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "abi.hpp"
#include "fiber.hpp"
#include "shadow.hpp"

namespace emu {

struct Range {
  uintptr_t begin = 0, bytes = 0;
  bool contains(uintptr_t a) const { return a - begin < bytes; }
  bool contains(uintptr_t a, size_t size) const { return a - begin < bytes && size <= bytes - (a - begin); }
};

struct ModuleRange : Range { bool writable = false; };

struct Region : Range {
  bool writable = false;
  uint64_t* marks = nullptr;  // one per byte, or null when writes to this region are not followed
};

struct AsyncCopy {
  void* shared;
  const void* global;
  size_t size, zfill;
  uint64_t batch;
  uint32_t pc;
};

struct AsyncQueue {  // of one thread
  uint64_t batch = 0;
  std::vector<AsyncCopy> copies;
};

struct Warp {
  uint32_t running = 0;  // lanes that have not ended
  uint32_t waiting = 0;  // lanes in a warp operation
};

struct Worker;

struct Run {
  EmuLaunch launch;
  std::vector<char> args;           // the kernel's argument, copied from here to each thread's stack
  std::vector<Region> regions;
  std::vector<ModuleRange> module;  // segments of the kernel's shared object
  Range text;                       // the one that is executable
  uintptr_t module_base = 0;

  std::atomic<unsigned> next_block{0};
  std::atomic<unsigned> stop_after;  // no block beyond this one need run: the lowest that failed
  std::atomic<bool> cancelled{false};

  std::mutex mutex;                  // guards what follows
  std::condition_variable finished;
  unsigned running = 0;
  EmuError error{};
  EmuStats stats{};
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<std::thread> threads;
  ~Run();
};

struct Worker {
  explicit Worker(Run& r) : run(r) {}

  void work();                  // the body of the OS thread
  void run_blocks();
  void report();                // hands this worker's error to the run
  void run_block(unsigned b);
  void end(Fiber* f);           // f's thread has returned from the kernel
  bool release_barrier();       // true when every thread waits at one and the same barrier
  void switch_to(Fiber* f);
  [[noreturn]] void leave();    // from a fiber, for good: the block is given up
  void yield(Fiber* f) { emu_switch(&f->stack_pointer, scheduler); }
  void meet(Fiber* f);          // completes a warp operation once all of its lanes are there
  void describe_divergence();

  Run& run;
  pthread_t os_thread{};
  void* scheduler = nullptr;    // the stack pointer of run_block while a fiber runs
  Fiber* volatile current = nullptr;  // volatile: read by the signal handler

  unsigned block = 0, threads = 0, alive = 0;
  StackArena* stacks = nullptr;
  std::vector<Fiber> fibers;    // one per thread of the block
  std::vector<Warp> warps;
  std::vector<uint16_t> ready, released;
  uint64_t random = 0;
  Order order;
  bool fenced = false;          // this block has used __threadfence() or a global atomic
  std::vector<AsyncQueue> queues;

  Range shared;                 // the thread-local image of the kernel: static, then or before, dynamic memory
  Range dynamic;                // the part of it that `extern __shared__` names, EMU_DYNAMIC_SHARED_CAPACITY long
  Cell* cells = nullptr;        // one per byte of `shared`

  const Region* last_region = nullptr;
  bool failed = false;
  EmuError error{};
  EmuStats stats{};
  std::unique_ptr<char[]> signal_stack;

  Fiber* fiber(unsigned thread) { return &fibers[thread]; }
  bool in_shared_window(uintptr_t a, size_t size) const {
    if (!shared.contains(a, size)) return false;
    return !dynamic.contains(a) || a - dynamic.begin + size <= run.launch.shared_bytes;
  }
  uint32_t pc_of(const void* pc) const {
    const auto p = reinterpret_cast<uintptr_t>(pc);
    return run.text.contains(p) ? static_cast<uint32_t>(p - run.module_base) : 0;
  }
  EmuError& begin_error(const Fiber* f, int kind, const void* pc) {
    failed = true;
    error = EmuError{};
    error.kind = kind;
    error.thread = f ? f->thread : ~0u;
    error.block = block;
    error.other_thread = error.other_block = ~0u;
    error.pc = pc ? pc_of(pc) : 0;
    return error;
  }
};

inline Worker* this_worker() { return this_fiber()->worker; }

}  // namespace emu
