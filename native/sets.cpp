// Which instruction sets this processor has, of those that were compiled: the best first.

#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(WITH_amx)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(WITH_avx512_bf16)
static bool avx512_bf16() {
  constexpr unsigned VECTORS = 1u << 5;
  unsigned has, b, c, d;
  return __get_cpuid_count(7, 1, &has, &b, &c, &d) && (has & VECTORS);
}
#endif

#if defined(WITH_amx)
// Whether there are tiles of bf16, and the system lets this process use them: it keeps no room for them unless asked.
static bool amx() {
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, has;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &has) || (has & (BF16 | TILE)) != (BF16 | TILE)) return false;
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif

static std::string found() {
  std::string best_first = "portable";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto also = [&](bool has, const char* name) {
    if (has) best_first = std::string(name) + " " + best_first;
    return has;
  };
  if (!also(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"), "avx2"))
    return best_first;
  if (!also(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"), "avx512"))
    return best_first;
#if defined(WITH_avx512_bf16)
  if (!also(avx512_bf16(), "avx512_bf16")) return best_first;
#endif
#if defined(WITH_amx)
  also(amx(), "amx");
#endif
#endif
  return best_first;
}

extern "C" const char* instruction_sets() {
  static const std::string sets = found();
  return sets.c_str();
}
