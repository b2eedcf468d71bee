// checks.hpp: what the compiler's instrumentation calls.
//
// -fsanitize=thread makes the compiler call __tsan_read4(address) and friends for every access to memory that
// another thread could see; no part of ThreadSanitizer's own run-time is used. -fsanitize=alignment,bounds,...
// calls __ubsan_handle_*() where the C++ language has been broken. Each of them ends the block, with a report.
#pragma once

#include <stdio.h>
#include <string.h>

#include "worker.hpp"

#define EMU_PC __builtin_return_address(0)

namespace emu {

enum class Access { read, write, atomic };

[[noreturn]] inline void fail_access(Fiber* f, int kind, uintptr_t a, size_t size, Access access, const void* pc) {
  Worker& w = *f->worker;
  EmuError& e = w.begin_error(f, kind, pc);
  e.size = static_cast<unsigned>(size);
  e.is_write = access != Access::read;
  e.is_shared = w.shared.contains(a);
  e.address = e.is_shared ? a - w.shared.begin : a;
  w.leave();
}

[[noreturn]] inline void fail_text(Fiber* f, int kind, const void* pc, const char* file, int line, const char* text) {
  EmuError& e = f->worker->begin_error(f, kind, pc);
  if (file) snprintf(e.text, sizeof e.text, "%s:%d: %s", file, line, text);
  else snprintf(e.text, sizeof e.text, "%s", text);
  f->worker->leave();
}

[[noreturn]] inline void fail_race(Fiber* f, uintptr_t a, size_t size, Access access, const void* pc,
                                   uint32_t other_thread, uint32_t other_block, uint32_t other_pc, bool other_write) {
  Worker& w = *f->worker;
  EmuError& e = w.begin_error(f, EMU_RACE, pc);
  e.size = static_cast<unsigned>(size);
  e.is_write = access != Access::read;
  e.is_shared = w.shared.contains(a);
  e.address = e.is_shared ? a - w.shared.begin : a;
  e.other_thread = other_thread;
  e.other_block = other_block;
  e.other_pc = other_pc;
  e.other_is_write = other_write;
  w.leave();
}

inline void shared_access(Fiber* f, uintptr_t a, size_t size, Access access, const void* pc) {
  Worker& w = *f->worker;
  if (!w.in_shared_window(a, size)) fail_access(f, EMU_OUT_OF_BOUNDS, a, size, access, pc);
  Cell* cell = w.cells + (a - w.shared.begin);
  const uint32_t me = f->thread, tick = f->tick, here = w.pc_of(pc);
  for (size_t i = 0; i < size; ++i, ++cell) {
    if (cell->writer == Cell::kExempt) continue;
    if (cell->writer) {
      const uint32_t other = cell->writer - 1u;
      if (!(access == Access::atomic && cell->atomic) && !w.order.ordered(other, cell->write.tick, me))
        fail_race(f, a, size, access, pc, other, w.block, cell->write.pc, true);
    } else if (access != Access::write) {
      fail_access(f, EMU_UNINITIALISED, a + i, size, access, pc);
    }
    if (access == Access::read) {
      cell->note_read(me, tick, here, w.order);
    } else {
      for (int r = 0; r < 2; ++r)
        if (cell->reader[r] && !w.order.ordered(cell->reader[r] - 1u, cell->read[r].tick, me))
          fail_race(f, a, size, access, pc, cell->reader[r] - 1u, w.block, cell->read[r].pc, false);
      cell->writer = static_cast<uint16_t>(me + 1);
      cell->write = {tick, here};
      cell->atomic = access == Access::atomic;
    }
  }
}

// Two blocks (or two threads of one block, with no barrier between) that meet in one byte of an output.
// A block that has fenced or used an atomic may be ordered in ways that are not followed here.
inline void global_marks(Fiber* f, const Region& region, uintptr_t a, size_t size, Access access, const void* pc) {
  Worker& w = *f->worker;
  const uint64_t mine = GlobalMark::pack(w.block, f->thread, access == Access::atomic, f->tick);
  for (size_t i = 0; i < size; ++i) {
    uint64_t* mark = region.marks + (a - region.begin) + i;
    const uint64_t seen = __atomic_load_n(mark, __ATOMIC_RELAXED);
    if (seen && !(access == Access::atomic && GlobalMark::atomic(seen))) {
      const uint32_t block = GlobalMark::block(seen), thread = GlobalMark::thread(seen);
      const bool fine = block == w.block ? w.order.ordered(thread, GlobalMark::tick(seen), f->thread) : w.fenced;
      if (!fine) fail_race(f, a, size, access, pc, thread, block, 0, true);
    }
    if (access != Access::read) __atomic_store_n(mark, mine, __ATOMIC_RELAXED);
  }
}

// Regions may overlap, as those of strided arrays in one buffer do: for a write, one that may be written counts.
inline const Region* find_region(Worker& w, uintptr_t a, size_t size, Access access) {
  const auto fits = [&](const Region& r) { return r.contains(a, size) && (access == Access::read || r.writable); };
  if (w.last_region && fits(*w.last_region)) return w.last_region;
  for (const Region& r : w.run.regions)
    if (fits(r)) return w.last_region = &r;
  return nullptr;
}

inline __attribute__((always_inline)) void check(const void* address, size_t size, Access access, bool aligned,
                                                 const void* pc) {
  const auto a = reinterpret_cast<uintptr_t>(address);
  if (on_this_stack(a)) return;  // the thread's own local memory
  Fiber* f = this_fiber();
  Worker& w = *f->worker;
  if (access == Access::read && a - reinterpret_cast<uintptr_t>(w.run.args.data()) < w.run.args.size()) return;
  ++(access == Access::read ? w.stats.loads : w.stats.stores);
  if (aligned && (a & (size - 1))) fail_access(f, EMU_MISALIGNED, a, size, access, pc);
  if (w.shared.contains(a)) return shared_access(f, a, size, access, pc);
  if (const Region* r = find_region(w, a, size, access)) {
    if (r->marks) global_marks(f, *r, a, size, access, pc);
    return;
  }
  for (const ModuleRange& r : w.run.module)  // constants and __device__ variables
    if (r.contains(a, size) && (access == Access::read || r.writable)) return;
  const bool readable = access != Access::read && find_region(w, a, size, Access::read);
  fail_access(f, readable ? EMU_READ_ONLY : EMU_OUT_OF_BOUNDS, a, size, access, pc);
}

inline void* copy(void* to, const void* from, size_t n, const void* pc) {
  if (n && this_fiber()->worker->run.launch.checked) {
    check(from, n, Access::read, false, pc);
    check(to, n, Access::write, false, pc);
  }
  return memmove(to, from, n);
}

inline void* fill(void* to, int byte, size_t n, const void* pc) {
  if (n && this_fiber()->worker->run.launch.checked) check(to, n, Access::write, false, pc);
  return memset(to, byte, n);
}

}  // namespace emu

#define EMU_TSAN(size)                                                                                             \
  void __tsan_read##size(const void* p) { emu::check(p, size, emu::Access::read, true, EMU_PC); }                  \
  void __tsan_write##size(void* p) { emu::check(p, size, emu::Access::write, true, EMU_PC); }                      \
  void __tsan_unaligned_read##size(const void* p) { emu::check(p, size, emu::Access::read, false, EMU_PC); }       \
  void __tsan_unaligned_write##size(void* p) { emu::check(p, size, emu::Access::write, false, EMU_PC); }           \
  void __tsan_read_write##size(void* p) {                                                                          \
    emu::check(p, size, emu::Access::read, true, EMU_PC);                                                          \
    emu::check(p, size, emu::Access::write, true, EMU_PC);                                                         \
  }                                                                                                                \
  void __tsan_unaligned_read_write##size(void* p) {                                                                \
    emu::check(p, size, emu::Access::read, false, EMU_PC);                                                         \
    emu::check(p, size, emu::Access::write, false, EMU_PC);                                                        \
  }

#pragma GCC visibility push(default)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
EMU_TSAN(1)
EMU_TSAN(2)
EMU_TSAN(4)
EMU_TSAN(8)
EMU_TSAN(16)
void __tsan_read_range(const void* p, size_t n) { if (n) emu::check(p, n, emu::Access::read, false, EMU_PC); }
void __tsan_write_range(void* p, size_t n) { if (n) emu::check(p, n, emu::Access::write, false, EMU_PC); }

void* emu_memcpy(void* to, const void* from, size_t n) { return emu::copy(to, from, n, EMU_PC); }
void* emu_memmove(void* to, const void* from, size_t n) { return emu::copy(to, from, n, EMU_PC); }
void* emu_memset(void* to, int byte, size_t n) { return emu::fill(to, byte, n, EMU_PC); }
// Clang calls these for structs that it copies or clears as a whole.
void* __tsan_memcpy(void* to, const void* from, size_t n) { return emu::copy(to, from, n, EMU_PC); }
void* __tsan_memmove(void* to, const void* from, size_t n) { return emu::copy(to, from, n, EMU_PC); }
void* __tsan_memset(void* to, int byte, size_t n) { return emu::fill(to, byte, n, EMU_PC); }

// ---- UndefinedBehaviorSanitizer: the layouts are those that GCC and Clang emit ------------------------------
struct UbsanSource { const char* file; unsigned line, column; };
struct UbsanType { unsigned short kind, info; char name[1]; };
struct UbsanTypeMismatch { UbsanSource source; const UbsanType* type; unsigned char log_alignment, check; };
struct UbsanOverflow { UbsanSource source; const UbsanType* type; };
struct UbsanBounds { UbsanSource source; const UbsanType* array; const UbsanType* index; };

[[noreturn]] static void undefined(int kind, const UbsanSource& s, const void* pc, const char* text) {
  emu::fail_text(emu::this_fiber(), kind, pc, s.file, static_cast<int>(s.line), text);
}

void __ubsan_handle_type_mismatch_v1_abort(UbsanTypeMismatch* d, uintptr_t address) {
  char text[256];
  emu::Fiber* f = emu::this_fiber();
  snprintf(text, sizeof text, "%s", d->type->name);
  emu::Worker& w = *f->worker;
  EmuError& e = w.begin_error(f, EMU_MISALIGNED, EMU_PC);
  snprintf(e.text, sizeof e.text, "%s:%u: %s", d->source.file, d->source.line, text);
  e.size = 1u << d->log_alignment;
  e.is_write = d->check == 1;
  e.is_shared = w.shared.contains(address);
  e.address = e.is_shared ? address - w.shared.begin : address;
  w.leave();
}
void __ubsan_handle_out_of_bounds_abort(UbsanBounds* d, uintptr_t index) {
  char text[256];
  snprintf(text, sizeof text, "index %lld is outside the array of type %s", static_cast<long long>(index),
           d->array->name);
  undefined(EMU_UNDEFINED, d->source, EMU_PC, text);
}
#define EMU_UBSAN(handler, what)                                                          \
  void __ubsan_handle_##handler##_abort(UbsanOverflow* d, uintptr_t, uintptr_t) {         \
    char text[256];                                                                       \
    snprintf(text, sizeof text, what " in type %s", d->type->name);                       \
    undefined(EMU_UNDEFINED, d->source, EMU_PC, text);                                    \
  }
EMU_UBSAN(add_overflow, "integer overflow in an addition")
EMU_UBSAN(sub_overflow, "integer overflow in a subtraction")
EMU_UBSAN(mul_overflow, "integer overflow in a multiplication")
EMU_UBSAN(negate_overflow, "integer overflow in a negation")
EMU_UBSAN(divrem_overflow, "division by zero, or its result overflows,")
}
#pragma GCC visibility pop
