#include "cpu.h"
#include <cstdlib>
#include <dlib/error.h>
#include <string>

// From the best level to the one that every CPU has: its name, its namespace, and whether this CPU has what
// CMakeLists.txt compiles it for.  __builtin_cpu_supports() also asks whether the operating system saves the registers.
#if defined(__x86_64__)
#define HAS __builtin_cpu_supports
#define LEVELS(level) \
    level("AVX-512", avx512, HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl") && HAS("fma")) \
    level("AVX2", avx2, HAS("avx2") && HAS("fma")) \
    level("SSE2", sse2, true)
#elif defined(__aarch64__)
#define LEVELS(level) level("NEON", any, true)
#else
#define LEVELS(level) level("generic", any, true)
#endif

#define DECLARE(name, level, supported) \
    namespace level \
    { \
        extern const convolution_kernels convolution; \
        extern const hog_kernels hog; \
        extern const resize_kernels resizing; \
    }
LEVELS(DECLARE)

static cpu_level chosen_level()
{
    const char* const variable = std::getenv("FACES_CPU");
    const std::string wish = variable ? variable : "";
    std::string names;
#define CHOOSE(name, level, supported) \
    if (supported) \
    { \
        if (wish.empty() || wish == name) \
            return {name, &level::convolution, &level::hog, &level::resizing}; \
        names += (names.empty() ? "" : ", ") + std::string(name); \
    }
    LEVELS(CHOOSE)
    throw dlib::error("FACES_CPU is " + wish + ": this CPU can take " + names + ".");
}

const cpu_level& cpu()
{
    static const cpu_level level = chosen_level();
    return level;
}
