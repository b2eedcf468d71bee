// cuda_shim.hpp: what nvcc and NVRTC provide without an #include, for a host C++ compiler.
//
// Included before every kernel. Holds: keywords, indices, barriers, warp operations, atomics, asynchronous copies,
// and EMU_MODULE, which exports the kernel to the engine. Vector types and mathematics have their own files.
#pragma once

#include "../runtime/abi.hpp"

#ifndef L1ATTN_EMULATOR
#define L1ATTN_EMULATOR 1
#endif

// ---- keywords ----------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ __attribute__((unused))
// Blocks that run on different OS threads each have their own copy. __thread and not thread_local, which would guard
// variables of class type (__half2) with a flag of its own. `used`: or the compiler would take what it sees nobody
// write for zero, and drop what it sees nobody read. source.py writes `extern __shared__` as EMU_EXTERN_SHARED.
#define __shared__ static __thread __attribute__((used))
#define EMU_EXTERN_SHARED extern __thread

#include "vector_types.hpp"
// (mathematics needs the keywords and the vector types)
#include "cuda_math.hpp"

// ---- indices -----------------------------------------------------------------------------------------------

__forceinline__ uint3 emu_uint3(EmuIndex i) { return {i.x, i.y, i.z}; }
#define threadIdx (emu_uint3(emu_thread_idx()))
#define blockIdx (emu_uint3(emu_block_idx()))
#define blockDim (dim3(emu_uint3(emu_block_dim())))
#define gridDim (dim3(emu_uint3(emu_grid_dim())))
constexpr int warpSize = 32;

// ---- barriers and fences -----------------------------------------------------------------------------------

#define EMU_HERE(what)                                                               \
  (__extension__({                                                                   \
    static constexpr EmuSite emu_site{what, __FILE__, __LINE__, __COUNTER__};        \
    &emu_site;                                                                       \
  }))

#define __syncthreads() ((void)emu_barrier(EMU_HERE("__syncthreads"), EMU_NONE, 0))
#define __syncthreads_count(p) emu_barrier(EMU_HERE("__syncthreads_count"), EMU_COUNT, !!(p))
#define __syncthreads_and(p) emu_barrier(EMU_HERE("__syncthreads_and"), EMU_AND, !!(p))
#define __syncthreads_or(p) emu_barrier(EMU_HERE("__syncthreads_or"), EMU_OR, !!(p))

__forceinline__ void __threadfence_block() {}
__forceinline__ void __threadfence() { emu_fence(); }
__forceinline__ void __threadfence_system() { emu_fence(); }

// ---- warp operations ---------------------------------------------------------------------------------------

__forceinline__ int emu_lane() { return static_cast<int>(emu_thread_idx().x & 31u); }

__forceinline__ void emu_syncwarp(const EmuSite* site, unsigned mask = 0xffffffffu) {
  emu_warp(site, EMU_SYNC, mask, 0, 0);
}
__forceinline__ unsigned emu_ballot(const EmuSite* site, unsigned mask, int predicate) {
  return static_cast<unsigned>(emu_warp(site, EMU_BALLOT, mask, predicate != 0, 0));
}

template <class T>
__forceinline__ T emu_shuffle(const EmuSite* site, unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  unsigned long long bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = emu_warp(site, EMU_SHUFFLE, mask, bits, from);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
__forceinline__ T emu_shuffle_to(const EmuSite* site, unsigned mask, T value, int from, int width = 32) {
  const int lane = emu_lane();
  return emu_shuffle(site, mask, value, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T>
__forceinline__ T emu_shuffle_up(const EmuSite* site, unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emu_lane(), from = lane - static_cast<int>(delta);
  return emu_shuffle(site, mask, value, from < (lane & ~(width - 1)) ? lane : from);
}
template <class T>
__forceinline__ T emu_shuffle_down(const EmuSite* site, unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emu_lane(), from = lane + static_cast<int>(delta);
  return emu_shuffle(site, mask, value, from > (lane | (width - 1)) ? lane : from);
}
template <class T>
__forceinline__ T emu_shuffle_xor(const EmuSite* site, unsigned mask, T value, int with, int width = 32) {
  const int lane = emu_lane(), from = lane ^ with;
  return emu_shuffle(site, mask, value, from > (lane | (width - 1)) ? lane : from);
}

#define __syncwarp(...) emu_syncwarp(EMU_HERE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)
#define __activemask() emu_active_mask()
#define __ballot_sync(mask, p) emu_ballot(EMU_HERE("__ballot_sync"), mask, !!(p))
#define __any_sync(mask, p) (emu_ballot(EMU_HERE("__any_sync"), mask, !!(p)) != 0)
#define __all_sync(mask, p) (emu_ballot(EMU_HERE("__all_sync"), mask, !(p)) == 0)
#define __shfl_sync(...) emu_shuffle_to(EMU_HERE("__shfl_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) emu_shuffle_up(EMU_HERE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) emu_shuffle_down(EMU_HERE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) emu_shuffle_xor(EMU_HERE("__shfl_xor_sync"), __VA_ARGS__)

// ---- atomics: each returns the old value -------------------------------------------------------------------

template <int kBytes> struct EmuBits;
template <> struct EmuBits<2> { using type = unsigned short; };
template <> struct EmuBits<4> { using type = unsigned int; };
template <> struct EmuBits<8> { using type = unsigned long long; };

template <class T> struct EmuPlain { using type = T; };  // keeps an argument out of template deduction

template <class T, class Update>
__forceinline__ T emu_atomic(T* address, Update update) {
  using Bits = typename EmuBits<sizeof(T)>::type;
  Bits seen = static_cast<Bits>(emu_atomic_load(address, sizeof(T)));
  for (;;) {
    T old, next;
    __builtin_memcpy(&old, &seen, sizeof(T));
    next = update(old);
    Bits desired;
    __builtin_memcpy(&desired, &next, sizeof(T));
    const Bits before = static_cast<Bits>(emu_atomic_cas(address, seen, desired, sizeof(T)));
    if (before == seen) return old;
    seen = before;
  }
}

#define EMU_ATOMIC(name, expression)                                             \
  template <class T>                                                             \
  __forceinline__ T name(T* address, typename EmuPlain<T>::type value) {         \
    return emu_atomic(address, [&](T old) -> T { return (expression); });        \
  }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicExch, ((void)old, value))
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicMax, old < value ? value : old)
EMU_ATOMIC(atomicAnd, old & value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicXor, old ^ value)
EMU_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
EMU_ATOMIC(atomicDec, old == 0 || old > value ? value : T(old - 1))
#undef EMU_ATOMIC

template <class T>
__forceinline__ T atomicCAS(T* address, typename EmuPlain<T>::type compare, typename EmuPlain<T>::type value) {
  return emu_atomic(address, [&](T old) -> T { return old == compare ? value : old; });
}

// ---- loads and stores with a cache hint --------------------------------------------------------------------

template <class T> __forceinline__ T __ldg(const T* p) { return *p; }
template <class T> __forceinline__ T __ldca(const T* p) { return *p; }
template <class T> __forceinline__ T __ldcg(const T* p) { return *p; }
template <class T> __forceinline__ T __ldcs(const T* p) { return *p; }
template <class T> __forceinline__ void __stcg(T* p, typename EmuPlain<T>::type v) { *p = v; }
template <class T> __forceinline__ void __stcs(T* p, typename EmuPlain<T>::type v) { *p = v; }

// ---- the C library's ---------------------------------------------------------------------------------------

#include <string.h>
#include "checked_memory.hpp"
extern "C" int printf(const char*, ...);

// ---- asynchronous copies (cuda_pipeline_primitives.h) ------------------------------------------------------

__forceinline__ void __pipeline_memcpy_async(void* shared, const void* global, size_t size, size_t zfill = 0) {
  emu_async_copy(shared, global, size, zfill);
}
__forceinline__ void __pipeline_commit() { emu_async_commit(); }
__forceinline__ void __pipeline_wait_prior(size_t batches_in_flight) { emu_async_wait(batches_in_flight); }

// ---- promises and traps ------------------------------------------------------------------------------------

// A promise to the compiler on the GPU; here it is checked.
#define __builtin_assume(x) \
  ((x) ? (void)0 : emu_trap(__FILE__, __LINE__, "the assumption is false", #x))
#undef assert
#define assert(x) ((x) ? (void)0 : emu_trap(__FILE__, __LINE__, "assertion failed", #x))
#define __trap() emu_trap(__FILE__, __LINE__, "__trap()", "")

// ---- the kernel's own description of itself ----------------------------------------------------------------

template <class Entry> struct EmuEntry {
  static_assert(sizeof(Entry) == 0, "the entry must be: extern \"C\" __global__ void entry(const SomeStruct args)");
};
template <class Args, void (*kEntry)(Args)> struct EmuCall {
  static void call(const void* args) { kEntry(*static_cast<const Args*>(args)); }
};
template <class Args> struct EmuEntry<void(Args)> {
  static constexpr unsigned long long bytes = sizeof(Args);
  template <void (*kEntry)(Args)> using Call = EmuCall<Args, kEntry>;
};

inline void* emu_shared_anchor() {
  static __thread char emu_anchor;
  return &emu_anchor;
}

#define EMU_MODULE(entry, dynamic_shared)                                                             \
  extern "C" __attribute__((visibility("default"))) const EmuModule emu_module = {                    \
      EmuEntry<decltype(entry)>::Call<entry>::call, EmuEntry<decltype(entry)>::bytes,                 \
      emu_shared_anchor, dynamic_shared};
