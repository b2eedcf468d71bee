// engine.cpp: runs a compiled kernel. Built once into a shared object that every kernel is linked with.
//
// Files: abi.hpp (what crosses borders), fiber.hpp (threads), shadow.hpp (what is remembered of memory),
// worker.hpp (a launch and its OS threads), checks.hpp (the compiler's callbacks), sync.hpp (barriers, warps,
// atomics), faults.hpp (signals), and here: the scheduler of a block, and the four functions Python calls.
#include <link.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <numeric>

#include "abi.hpp"
#include "checks.hpp"
#include "faults.hpp"
#include "fiber.hpp"
#include "sync.hpp"
#include "worker.hpp"

namespace emu {

// Kernels are compiled for the GPU with -ftz=true: denormal inputs and results are zero.
inline void flush_denormals() {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040u);  // FTZ, DAZ
#else
  uint64_t fpcr;
  asm volatile("mrs %0, fpcr" : "=r"(fpcr));
  asm volatile("msr fpcr, %0" ::"r"(fpcr | (1u << 24)));
#endif
}

// The kernel's segments, and (per OS thread) its thread-local image.
struct Image {
  uintptr_t inside = 0, base = 0;
  std::vector<ModuleRange> segments;
  Range text, thread_local_image;
};

static int find_image(dl_phdr_info* info, size_t, void* out) {
  auto& image = *static_cast<Image*>(out);
  const auto* end = info->dlpi_phdr + info->dlpi_phnum;
  const bool found = std::any_of(info->dlpi_phdr, end, [&](const ElfW(Phdr) & p) {
    return p.p_type == PT_LOAD && image.inside - (info->dlpi_addr + p.p_vaddr) < p.p_memsz;
  });
  if (!found) return 0;
  image.base = info->dlpi_addr;
  for (const auto* p = info->dlpi_phdr; p != end; ++p) {
    const Range range{info->dlpi_addr + p->p_vaddr, p->p_memsz};
    if (p->p_type == PT_TLS) image.thread_local_image = {reinterpret_cast<uintptr_t>(info->dlpi_tls_data), p->p_memsz};
    if (p->p_type != PT_LOAD) continue;
    if (p->p_flags & PF_X) image.text = range;
    ModuleRange segment;
    static_cast<Range&>(segment) = range;
    segment.writable = p->p_flags & PF_W;
    image.segments.push_back(segment);
  }
  return 1;
}

static Image image_of(const EmuModule* module) {
  Image image;
  image.inside = reinterpret_cast<uintptr_t>(module->entry);
  dl_iterate_phdr(find_image, &image);
  return image;
}

static uint32_t next_random(uint64_t& state, uint32_t below) {  // splitmix64, scaled
  uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>(((z ^ (z >> 31)) >> 32) * below >> 32);
}

static void* map_zeroed(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

static void fiber_main() {
  Fiber* f = this_fiber();
  Worker& w = *f->worker;
  w.run.launch.module->entry(w.run.args.data());
  w.end(f);
  w.leave();
}

void Worker::leave() {
  void* unused;
  emu_switch(&unused, scheduler);
  __builtin_unreachable();
}

void Worker::switch_to(Fiber* f) {
  current = f;
  emu_switch(&scheduler, f->stack_pointer);
  current = nullptr;
}

void Worker::run_block(unsigned b) {
  block = b;
  alive = threads;
  fenced = false;
  random = run.launch.seed * 0xd1342543de82ef95ull + b;
  order.reset(threads, run.launch.checked);
  for (AsyncQueue& q : queues) {
    q.batch = 0;
    q.copies.clear();
  }
  warps.assign((threads + 31) / 32, Warp{~0u, 0});
  if (threads % 32) warps.back().running = (1u << threads % 32) - 1;
  released.clear();
  ready.resize(threads);
  std::iota(ready.begin(), ready.end(), 0);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber* f = fiber(i);
    *f = Fiber{};
    f->worker = this;
    f->thread = i;
    f->tick = order.clock;
    prepare(f, stacks->low_end(i), fiber_main);
  }

  // All ones is NaN in every floating-point format and -1 as an integer: nothing that passes for a result.
  const auto poison = [&](uintptr_t begin, size_t bytes) {
    memset(reinterpret_cast<void*>(begin), 0xff, bytes);
    if (run.launch.checked) memset(static_cast<void*>(cells + (begin - shared.begin)), 0, bytes * sizeof(Cell));
  };
  if (dynamic.bytes) {
    const uintptr_t after = dynamic.begin + dynamic.bytes;
    poison(shared.begin, dynamic.begin - shared.begin);
    poison(dynamic.begin, run.launch.shared_bytes);
    poison(after, shared.begin + shared.bytes - after);
  } else {
    poison(shared.begin, shared.bytes);
  }
  if (run.launch.checked)
    for (unsigned i = 0; i < run.launch.guard_count; ++i) cells[run.launch.guards[i]].writer = Cell::kExempt;

  while (alive > 0) {
    if (run.cancelled) { begin_error(nullptr, EMU_STOPPED, nullptr); return; }
    for (auto i = static_cast<uint32_t>(ready.size()); i > 1; --i)
      std::swap(ready[i - 1], ready[next_random(random, i)]);
    for (const uint16_t thread : ready) {
      switch_to(fiber(thread));
      if (failed) return;
    }
    ready.clear();
    ready.swap(released);
    if (ready.empty() && alive > 0 && !release_barrier()) return describe_divergence();
  }
}

// Of several failing blocks the lowest is reported, whichever ran first; being stopped is the least of errors.
void Worker::report() {
  std::lock_guard<std::mutex> lock(run.mutex);
  const auto rank = [](const EmuError& e) { return e.kind == EMU_OK ? 2 : e.kind == EMU_STOPPED ? 1 : 0; };
  const int mine = rank(error), theirs = rank(run.error);
  if (mine < theirs || (mine == theirs && error.block < run.error.block)) run.error = error;
  run.stop_after = std::min(run.stop_after.load(), error.block);
}

void Worker::work() {
  flush_denormals();
  pthread_setspecific(worker_key(), this);
  stack_t stack{}, before{};
  signal_stack.reset(new char[2 * kSignalStackBytes]);
  stack.ss_sp = signal_stack.get();
  stack.ss_size = kSignalStackBytes;
  sigaltstack(&stack, &before);
  try {
    run_blocks();
  } catch (const std::exception& e) {
    strncpy(begin_error(nullptr, EMU_FAULT, nullptr).text, e.what(), sizeof error.text - 1);
    report();
  }
  pthread_setspecific(worker_key(), nullptr);
  sigaltstack(&before, nullptr);
  if (cells) munmap(cells, shared.bytes * sizeof(Cell));
  if (stacks) stacks->give_back();

  std::lock_guard<std::mutex> lock(run.mutex);
  run.stats.barriers += stats.barriers;
  run.stats.loads += stats.loads;
  run.stats.stores += stats.stores;
  if (--run.running == 0) run.finished.notify_all();
}

void Worker::run_blocks() {
  run.launch.module->shared_anchor();  // makes the loader allocate this thread's image
  shared = image_of(run.launch.module).thread_local_image;
  if (run.launch.module->dynamic_shared)
    dynamic = {reinterpret_cast<uintptr_t>(run.launch.module->dynamic_shared()), EMU_DYNAMIC_SHARED_CAPACITY};
  threads = run.launch.block;
  stacks = StackArena::borrow(threads);
  fibers.resize(threads);
  queues.resize(threads);
  if (run.launch.checked) cells = static_cast<Cell*>(map_zeroed(shared.bytes * sizeof(Cell)));

  for (;;) {
    const unsigned b = run.next_block++;
    if (b >= run.launch.grid || b > run.stop_after) break;
    run_block(b);
    if (!failed) continue;
    report();
    break;
  }
}

Run::~Run() {
  for (auto& t : threads) t.join();
  for (const Region& r : regions)
    if (r.marks) munmap(r.marks, r.bytes * sizeof(uint64_t));
}

// Of each writable byte 8 more are kept; beyond this size that is too much, and writes are not followed.
constexpr size_t kFollowedBytes = 256u << 20;

struct Handle {
  SignalHandlers handlers;  // outlives the threads
  Run run;
};

}  // namespace emu

#pragma GCC visibility push(default)
extern "C" {

// Starts a launch and returns a handle, or null when memory is short.
void* emu_start(const EmuLaunch* launch) try {
  auto handle = std::make_unique<emu::Handle>();
  emu::Run& run = handle->run;
  run.launch = *launch;
  const char* args = static_cast<const char*>(launch->args);
  run.args.assign(args, args + launch->module->args_bytes);
  const emu::Image image = emu::image_of(launch->module);
  run.module = image.segments;
  run.module_base = image.base;
  run.text = image.text;
  run.stop_after = launch->grid;
  for (unsigned i = 0; i < launch->region_count; ++i) {
    emu::Region region;
    region.begin = launch->regions[i].begin;
    region.bytes = launch->regions[i].bytes;
    region.writable = launch->regions[i].writable;
    if (launch->checked && region.writable && region.bytes && region.bytes <= emu::kFollowedBytes &&
        launch->grid <= emu::GlobalMark::kMaxBlocks)
      region.marks = static_cast<uint64_t*>(emu::map_zeroed(region.bytes * sizeof(uint64_t)));
    run.regions.push_back(region);
  }
  run.running = launch->workers;
  for (unsigned i = 0; i < launch->workers; ++i) run.workers.push_back(std::make_unique<emu::Worker>(run));
  for (auto& w : run.workers) run.threads.emplace_back([&w = *w] { w.work(); });
  return handle.release();
} catch (const std::exception&) {
  return nullptr;
}

// Waits at most `milliseconds`; returns whether the launch has ended.
int emu_wait(void* handle, int milliseconds) {
  emu::Run& run = static_cast<emu::Handle*>(handle)->run;
  std::unique_lock<std::mutex> lock(run.mutex);
  return run.finished.wait_for(lock, std::chrono::milliseconds(milliseconds), [&] { return run.running == 0; });
}

// Asks a launch to stop. To be repeated until emu_wait() says that it has: see faults.hpp.
void emu_cancel(void* handle) {
  emu::Run& run = static_cast<emu::Handle*>(handle)->run;
  run.cancelled = true;
  for (auto& t : run.threads) pthread_kill(t.native_handle(), emu::kStopSignal);
}

void emu_finish(void* handle, EmuStats* stats, EmuError* error) {
  std::unique_ptr<emu::Handle> owned(static_cast<emu::Handle*>(handle));
  for (auto& t : owned->run.threads) t.join();
  owned->run.threads.clear();
  *stats = owned->run.stats;
  *error = owned->run.error;
}
}
#pragma GCC visibility pop
