// checked_memory.hpp: memcpy, memmove and memset by way of the engine; the compiler would expand small ones in place,
// unseen. Macros, and included once more after every header that includes <cstring>, which takes them back.
#undef memcpy
#undef memmove
#undef memset
#define memcpy(to, from, bytes) emu_memcpy(to, from, bytes)
#define memmove(to, from, bytes) emu_memmove(to, from, bytes)
#define memset(to, byte, bytes) emu_memset(to, byte, bytes)
