// sync.hpp: where threads meet - barriers, warp operations - and what orders memory: atomics and async copies.
#pragma once

#include <stdio.h>

#include <algorithm>

#include "checks.hpp"

namespace emu {

template <class Visit>
inline void for_lanes(uint32_t lanes, Visit visit) {
  for (; lanes; lanes &= lanes - 1) visit(__builtin_ctz(lanes));
}

inline void Worker::meet(Fiber* f) {
  Warp& warp = warps[f->warp()];
  const uint32_t here = f->mask & warp.running;
  if (here & ~warp.waiting) return;
  const auto lane = [&, first = f->thread & ~31u](int i) { return fiber(first + static_cast<unsigned>(i)); };
  bool same = true;
  for_lanes(here, [&](int i) {
    const Fiber* g = lane(i);
    same &= g->mask == f->mask && g->op == f->op && g->site->id == f->site->id;
  });
  if (!same) return;

  uint64_t given[32];
  uint32_t ballot = 0;
  for_lanes(here, [&](int i) {
    given[i] = lane(i)->value;
    ballot |= static_cast<uint32_t>(given[i] & 1) << i;
  });
  ++order.clock;
  if (run.launch.checked) order.merge(f->warp(), here);
  for_lanes(here, [&](int i) {
    Fiber* g = lane(i);
    if (g->op == EMU_BALLOT) g->value = ballot;
    if (g->op == EMU_SHUFFLE)  // a lane that takes no part gives an undefined value: NaN, to be seen
      g->value = here >> g->source_lane & 1u ? given[g->source_lane] : ~0ull;
    g->tick = order.clock;
    g->state = State::ready;
    if (g != current) released.push_back(static_cast<uint16_t>(g->thread));
  });
  warp.waiting &= ~here;
}

inline void Worker::end(Fiber* f) {
  Warp& warp = warps[f->warp()];
  f->state = State::ended;
  --alive;
  warp.running &= ~(1u << f->lane());
  // Lanes that waited for this one may have waited for it alone.
  for_lanes(warp.waiting, [&](int i) {
    if (warp.waiting >> i & 1u) meet(fiber((f->thread & ~31u) + static_cast<unsigned>(i)));
  });
}

inline bool Worker::release_barrier() {
  const Fiber* first = nullptr;
  unsigned sum = 0;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber* f = fiber(i);
    if (f->state != State::at_barrier) return false;
    if (!first) first = f;
    if (f->site->id != first->site->id || f->vote != first->vote) return false;
    sum += static_cast<unsigned>(f->value);
  }
  ++stats.barriers;
  order.floor = ++order.clock;
  ready.clear();
  for (unsigned i = 0; i < threads; ++i) {
    Fiber* f = fiber(i);
    f->value = f->vote == EMU_AND ? sum == threads : f->vote == EMU_OR ? sum > 0 : sum;
    f->tick = order.clock;
    f->state = State::ready;
    ready.push_back(static_cast<uint16_t>(i));
  }
  return true;
}

// No thread can go on: say how many wait where.
inline void Worker::describe_divergence() {
  struct Group { int id; State state; const EmuSite* site; unsigned count, first; };
  std::vector<Group> groups;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber* f = fiber(i);
    const int id = f->state == State::ended ? -1 : f->site->id;
    auto g = std::find_if(groups.begin(), groups.end(), [&](const Group& x) { return x.id == id; });
    if (g == groups.end()) groups.push_back({id, f->state, f->site, 1, i});
    else ++g->count;
  }
  const auto waiting = std::find_if(groups.begin(), groups.end(), [](const Group& g) { return g.id >= 0; });
  EmuError& e = begin_error(fiber(waiting->first), EMU_DIVERGENT, nullptr);
  size_t used = 0;
  auto append = [&](const char* format, auto... values) {
    const int n = snprintf(e.text + used, sizeof e.text - used, format, values...);
    used = std::min(sizeof e.text - 1, used + static_cast<size_t>(std::max(n, 0)));
  };
  for (size_t i = 0; i < groups.size() && i < 4; ++i) {
    const Group& g = groups[i];
    append("%s%u thread%s (first: %u) ", i ? "; " : "", g.count, g.count == 1 ? "" : "s", g.first);
    if (g.id < 0) append("ended");
    else if (g.state == State::at_warp)
      append("in %s, %s:%d, mask 0x%08x", g.site->what, g.site->file, g.site->line, fiber(g.first)->mask);
    else append("in %s, %s:%d", g.site->what, g.site->file, g.site->line);
  }
  if (groups.size() > 4) append("; and %zu more places", groups.size() - 4);
}

// A write to shared memory that has begun and not arrived: the bytes hold nothing that may be read.
inline void mark_in_flight(Fiber* f, const AsyncCopy& c, const void* pc) {
  Worker& w = *f->worker;
  check(c.shared, c.size, Access::write, true, pc);
  Cell* cells = w.cells + (reinterpret_cast<uintptr_t>(c.shared) - w.shared.begin);
  for (size_t i = 0; i < c.size; ++i) cells[i].writer = 0;
}

inline void arrive(Fiber* f, const AsyncCopy& c) {
  Worker& w = *f->worker;
  memcpy(c.shared, c.global, c.size - c.zfill);
  memset(static_cast<char*>(c.shared) + c.size - c.zfill, 0, c.zfill);
  if (!w.run.launch.checked) return;
  Cell* cells = w.cells + (reinterpret_cast<uintptr_t>(c.shared) - w.shared.begin);
  for (size_t i = 0; i < c.size; ++i) {
    cells[i].writer = static_cast<uint16_t>(f->thread + 1);
    cells[i].write = {f->tick, c.pc};
    cells[i].atomic = 0;
  }
}

}  // namespace emu

extern "C" {

EmuIndex emu_thread_idx() { return {emu::this_fiber()->thread, 0, 0}; }
EmuIndex emu_block_idx() { return {emu::this_worker()->block, 0, 0}; }
EmuIndex emu_block_dim() { return {emu::this_worker()->threads, 1, 1}; }
EmuIndex emu_grid_dim() { return {emu::this_worker()->run.launch.grid, 1, 1}; }

int emu_barrier(const EmuSite* site, EmuVote vote, int predicate) {
  emu::Fiber* f = emu::this_fiber();
  f->site = site;
  f->vote = static_cast<uint8_t>(vote);
  f->value = predicate;
  f->state = emu::State::at_barrier;
  f->worker->yield(f);
  return static_cast<int>(f->value);
}

unsigned long long emu_warp(const EmuSite* site, EmuWarpOp op, unsigned mask, unsigned long long value, int lane) {
  emu::Fiber* f = emu::this_fiber();
  if (!(mask >> f->lane() & 1u)) {
    char text[160];
    snprintf(text, sizeof text, "%s with mask 0x%08x, which leaves out the calling lane %u", site->what, mask,
             f->lane());
    emu::fail_text(f, EMU_UNDEFINED, EMU_PC, site->file, site->line, text);
  }
  f->site = site;
  f->op = static_cast<uint8_t>(op);
  f->mask = mask;
  f->value = value;
  f->source_lane = static_cast<uint8_t>(lane & 31);
  f->state = emu::State::at_warp;
  f->worker->warps[f->warp()].waiting |= 1u << f->lane();
  f->worker->meet(f);
  if (f->state == emu::State::at_warp) f->worker->yield(f);
  return f->value;
}

unsigned emu_active_mask() {
  const emu::Fiber* f = emu::this_fiber();
  return f->worker->warps[f->warp()].running;
}

void emu_fence() { emu::this_worker()->fenced = true; }

unsigned long long emu_atomic_load(const void* p, int size) {
  emu::Worker& w = *emu::this_worker();
  if (!w.shared.contains(reinterpret_cast<uintptr_t>(p))) w.fenced = true;
  if (w.run.launch.checked) emu::check(p, static_cast<size_t>(size), emu::Access::atomic, true, EMU_PC);
  switch (size) {
    case 2: return __atomic_load_n(static_cast<const uint16_t*>(p), __ATOMIC_RELAXED);
    case 4: return __atomic_load_n(static_cast<const uint32_t*>(p), __ATOMIC_RELAXED);
    default: return __atomic_load_n(static_cast<const uint64_t*>(p), __ATOMIC_RELAXED);
  }
}

// Returns what was there: equal to `expected` when the exchange took place.
unsigned long long emu_atomic_cas(void* p, unsigned long long expected, unsigned long long desired, int size) {
  switch (size) {
    case 2: {
      auto e = static_cast<uint16_t>(expected);
      __atomic_compare_exchange_n(static_cast<uint16_t*>(p), &e, static_cast<uint16_t>(desired), false,
                                  __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
      return e;
    }
    case 4: {
      auto e = static_cast<uint32_t>(expected);
      __atomic_compare_exchange_n(static_cast<uint32_t*>(p), &e, static_cast<uint32_t>(desired), false,
                                  __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
      return e;
    }
    default: {
      auto e = static_cast<uint64_t>(expected);
      __atomic_compare_exchange_n(static_cast<uint64_t*>(p), &e, static_cast<uint64_t>(desired), false,
                                  __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
      return e;
    }
  }
}

// The data arrives as late as it may: when the wait for its batch begins. A missing wait then shows.
void emu_async_copy(void* shared, const void* global, unsigned long long size, unsigned long long zfill) {
  emu::Fiber* f = emu::this_fiber();
  emu::Worker& w = *f->worker;
  if ((size != 4 && size != 8 && size != 16) || zfill > size)
    emu::fail_text(f, EMU_UNDEFINED, EMU_PC, nullptr, 0, "__pipeline_memcpy_async copies 4, 8 or 16 bytes");
  emu::AsyncQueue& queue = w.queues[f->thread];
  const emu::AsyncCopy copy{shared, global, size, zfill, queue.batch, w.pc_of(EMU_PC)};
  if (!w.shared.contains(reinterpret_cast<uintptr_t>(shared)))
    emu::fail_text(f, EMU_UNDEFINED, EMU_PC, nullptr, 0, "__pipeline_memcpy_async copies into shared memory only");
  if (w.run.launch.checked) {
    if (size > zfill) emu::check(global, size - zfill, emu::Access::read, false, EMU_PC);
    if (reinterpret_cast<uintptr_t>(global) % size)
      emu::fail_access(f, EMU_MISALIGNED, reinterpret_cast<uintptr_t>(global), size, emu::Access::read, EMU_PC);
    emu::mark_in_flight(f, copy, EMU_PC);
  }
  queue.copies.push_back(copy);
}

void emu_async_commit() {
  emu::Fiber* f = emu::this_fiber();
  ++f->worker->queues[f->thread].batch;
}

void emu_async_wait(unsigned long long batches_in_flight) {
  emu::Fiber* f = emu::this_fiber();
  emu::AsyncQueue& queue = f->worker->queues[f->thread];
  auto& copies = queue.copies;
  size_t done = 0;  // copies lie in the order of their batches
  while (done < copies.size() && copies[done].batch + batches_in_flight < queue.batch) emu::arrive(f, copies[done++]);
  copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(done));
}

void emu_trap(const char* file, int line, const char* what, const char* text) {
  char both[300];
  snprintf(both, sizeof both, "%s%s%s", what, *text ? ": " : "", text);
  emu::fail_text(emu::this_fiber(), EMU_UNDEFINED, EMU_PC, file, line, both);
}
}
