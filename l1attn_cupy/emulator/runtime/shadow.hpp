// shadow.hpp: what is remembered about each byte of shared memory, and about each byte written to global memory.
//
// Order. A block counts its synchronisations in one `clock`. A thread's `tick` is the clock's value when it last
// took part in one. After a barrier everything with a tick below `floor` is ordered before everything that
// follows. Within a warp, known[a][b] is the tick below which lane b's accesses are ordered before lane a's next
// ones: it is merged over the lanes that meet in __syncwarp(), a shuffle or a vote. (CUDA promises memory order
// only for __syncwarp(); shuffles are accepted too, since compute-sanitizer and all hardware accept them.)
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "abi.hpp"

namespace emu {

struct Order {
  uint32_t clock = 1;
  uint32_t floor = 1;
  std::vector<uint32_t> known;  // [warp][lane a][lane b]

  void reset(unsigned threads, bool checked) {
    clock = floor = 1;
    if (checked) known.assign((threads + 31) / 32 * 1024, 0);
  }
  // The lanes `here` of a warp have met, at the present clock: each now knows what any of them knew.
  void merge(uint32_t warp, uint32_t here) {
    uint32_t* of_warp = known.data() + warp * 1024;
    uint32_t merged[32] = {};
    for (uint32_t a = 0; a < 32; ++a)
      if (here >> a & 1u)
        for (uint32_t b = 0; b < 32; ++b) merged[b] = std::max(merged[b], of_warp[a * 32 + b]);
    for (uint32_t b = 0; b < 32; ++b)
      if (here >> b & 1u) merged[b] = clock;
    for (uint32_t a = 0; a < 32; ++a)
      if (here >> a & 1u) std::copy(merged, merged + 32, of_warp + a * 32);
  }
  // Is `other`'s access at `tick` ordered before what `me` does now?
  bool ordered(uint32_t other, uint32_t tick, uint32_t me) const {
    if (other == me || tick < floor) return true;
    if ((other ^ me) >> 5) return false;
    return tick < known[(me >> 5) * 1024 + (me & 31) * 32 + (other & 31)];
  }
};

struct Mark {  // one access: who, when, where in the code
  uint32_t tick;
  uint32_t pc;
};

// Of one byte of shared memory. Two readers suffice: a writer is at most one of them.
struct Cell {
  static constexpr uint16_t kExempt = 0xffff;  // as the writer: not the kernel's own, never an error
  Mark write, read[2];
  uint16_t writer, reader[2];  // thread + 1; 0 is nobody, and a byte that nobody wrote is uninitialised
  uint16_t atomic;             // the last write was atomic

  void note_read(uint32_t me, uint32_t tick, uint32_t pc, const Order& order) {
    const uint16_t id = static_cast<uint16_t>(me + 1);
    int slot = -1;
    for (int i = 0; i < 2 && slot < 0; ++i)
      if (reader[i] == id || reader[i] == 0 || read[i].tick < order.floor) slot = i;
    if (slot < 0) {  // both are live: keep two different warps if there are two, as warps order themselves
      const bool same_warp = (reader[0] - 1) / 32 == (reader[1] - 1) / 32;
      if (!same_warp || (reader[0] - 1u) / 32 == me / 32) return;
      slot = 1;
    }
    reader[slot] = id;
    read[slot] = {tick, pc};
  }
};
static_assert(sizeof(Cell) == 32, "two cells to a cache line");

// Of one byte of writable global memory, packed so that workers can exchange it atomically:
// block + 1 in 22 bits, thread in 10, atomic in 1, tick in 31. Zero is "not written in this launch".
struct GlobalMark {
  static constexpr uint32_t kMaxBlocks = (1u << 22) - 2;
  static uint64_t pack(uint32_t block, uint32_t thread, bool atomic, uint32_t tick) {
    return (uint64_t(block + 1) << 42) | (uint64_t(thread) << 32) | (uint64_t(atomic) << 31) | (tick & 0x7fffffffu);
  }
  static uint32_t block(uint64_t m) { return uint32_t(m >> 42) - 1; }
  static uint32_t thread(uint64_t m) { return uint32_t(m >> 32) & 1023u; }
  static bool atomic(uint64_t m) { return (m >> 31) & 1; }
  static uint32_t tick(uint64_t m) { return uint32_t(m) & 0x7fffffffu; }
};

}  // namespace emu
