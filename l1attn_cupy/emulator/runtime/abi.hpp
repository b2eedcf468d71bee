// abi.hpp: the C structs that cross a border: engine <-> Python (ctypes) and engine <-> compiled kernel.
// abi.py mirrors the first group field by field; change both together.
#pragma once

// ---- engine <-> Python -------------------------------------------------------------------------------------

struct EmuRegion {  // global memory that a kernel may touch: bytes [begin, begin + bytes)
  unsigned long long begin;
  unsigned long long bytes;
  int writable;
};

enum EmuErrorKind : int {
  EMU_OK = 0,
  EMU_OUT_OF_BOUNDS,
  EMU_READ_ONLY,
  EMU_MISALIGNED,
  EMU_UNINITIALISED,
  EMU_RACE,
  EMU_DIVERGENT,
  EMU_STOPPED,
  EMU_UNDEFINED,  // an index, an overflow, a division, a trap, a false assumption: `text` says which
  EMU_FAULT,      // the processor's own signal: un-instrumented wild access, stack overflow
};

struct EmuError {
  int kind;
  int is_write;
  unsigned thread, block;              // who
  unsigned other_thread, other_block;  // the other party of a race; ~0u when there is none
  unsigned size;                       // bytes of the access
  int other_is_write;
  int is_shared;                       // address is a byte offset into the kernel's thread-local (shared) image
  int reserved;
  unsigned long long address;
  unsigned long long pc, other_pc;     // offsets into the kernel's shared object; 0 when unknown
  char text[512];
};

struct EmuStats {
  unsigned long long barriers, loads, stores;
};

// ---- engine <-> compiled kernel ----------------------------------------------------------------------------

struct EmuModule {                     // every compiled kernel exports one, as `emu_module`
  void (*entry)(const void* args);
  unsigned long long args_bytes;
  void* (*shared_anchor)();            // an address in the thread-local image, which is the shared memory
  void* (*dynamic_shared)();           // where every `extern __shared__` array begins; null when there is none
};

struct EmuLaunch {
  const EmuModule* module;
  const void* args;
  const EmuRegion* regions;
  const unsigned* guards;              // offsets, in the thread-local image, of bytes that are the compiler's own
  unsigned region_count, guard_count;
  unsigned grid, block;
  unsigned shared_bytes;
  unsigned workers;
  int checked;
  unsigned long long seed;
};

struct EmuSite {                       // one place in the source where threads wait for each other
  const char* what;                    // "__syncthreads", "__shfl_sync", ...
  const char* file;
  int line;
  int id;                              // unique for each place, so that two on one line differ
};

struct EmuIndex { unsigned x, y, z; };

enum EmuWarpOp : int { EMU_SYNC, EMU_SHUFFLE, EMU_BALLOT };
enum EmuVote : int { EMU_NONE, EMU_AND, EMU_OR, EMU_COUNT };

// Room for `extern __shared__` arrays: the most that a block can have on sm_90 (227 KiB).
#define EMU_DYNAMIC_SHARED_CAPACITY 232448

#pragma GCC visibility push(default)
extern "C" {
// A thread's indices never change while it runs, hence const: the compiler may keep them in registers.
EmuIndex emu_thread_idx() __attribute__((const));
EmuIndex emu_block_idx() __attribute__((const));
EmuIndex emu_block_dim() __attribute__((const));
EmuIndex emu_grid_dim() __attribute__((const));

int emu_barrier(const EmuSite* site, EmuVote vote, int predicate);
unsigned long long emu_warp(const EmuSite* site, EmuWarpOp op, unsigned mask, unsigned long long value, int lane);
unsigned emu_active_mask();
void emu_fence();
unsigned long long emu_atomic_load(const void* address, int size);
unsigned long long emu_atomic_cas(void* address, unsigned long long expected, unsigned long long desired, int size);
void emu_async_copy(void* shared, const void* global, unsigned long long size, unsigned long long zfill);
void emu_async_commit();
void emu_async_wait(unsigned long long batches_in_flight);
void* emu_memcpy(void* to, const void* from, __SIZE_TYPE__ bytes);
void* emu_memmove(void* to, const void* from, __SIZE_TYPE__ bytes);
void* emu_memset(void* to, int byte, __SIZE_TYPE__ bytes);
[[noreturn]] void emu_trap(const char* file, int line, const char* what, const char* text);
}
#pragma GCC visibility pop
