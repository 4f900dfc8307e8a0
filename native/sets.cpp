// Which instruction sets this processor has, of those that were compiled.

#if defined(WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Whether there are tiles of bf16, and the system lets this process use them: it keeps no room for them unless asked.
static bool amx() {
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, VECTORS_OF_BF16 = 1u << 5;
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, has, more;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &has) || (has & (BF16 | TILE)) != (BF16 | TILE)) return false;
  if (!__get_cpuid_count(7, 1, &more, &b, &c, &has) || !(more & VECTORS_OF_BF16)) return false;
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#else
static bool amx() { return false; }
#endif

extern "C" const char* instruction_sets() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return amx() ? "amx avx512 avx2 portable" : "avx512 avx2 portable";
  return avx2 ? "avx2 portable" : "portable";
#else
  return "portable";
#endif
}
