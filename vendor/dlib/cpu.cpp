#include "cpu.h"
#include <cstdlib>
#include <dlib/error.h>
#include <string>
#include <vector>

#define DECLARE_LEVEL(level) \
    namespace level \
    { \
        extern const convolution_kernels convolution; \
        extern const hog_kernels hog; \
        extern const resize_kernels resizing; \
    }
#define KERNELS(level) &level::convolution, &level::hog, &level::resizing

#ifdef __x86_64__
DECLARE_LEVEL(sse2)
DECLARE_LEVEL(avx2)
DECLARE_LEVEL(avx512)
#else
DECLARE_LEVEL(any)
#endif

namespace
{
    // From the best to the one that every CPU has.  The compiler's instructions are set in CMakeLists.txt.
    // __builtin_cpu_supports() also asks whether the operating system saves the registers.
    std::vector<cpu_level> supported_levels()
    {
        std::vector<cpu_level> levels;
#ifdef __x86_64__
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            levels.push_back({"AVX-512", KERNELS(avx512)});
        if (avx2)
            levels.push_back({"AVX2", KERNELS(avx2)});
        levels.push_back({"SSE2", KERNELS(sse2)});
#elif defined(__aarch64__)
        levels.push_back({"NEON", KERNELS(any)});
#else
        levels.push_back({"generic", KERNELS(any)});
#endif
        return levels;
    }

    cpu_level chosen_level()
    {
        const std::vector<cpu_level> levels = supported_levels();
        const char* const wish = std::getenv("FACES_CPU");
        if (!wish || !*wish)
            return levels.front();
        std::string names;
        for (const auto& level : levels)
        {
            if (std::string(wish) == level.name)
                return level;
            names += std::string(names.empty() ? "" : ", ") + level.name;
        }
        throw dlib::error("FACES_CPU is " + std::string(wish) + ": this CPU can take " + names + ".");
    }
}

const cpu_level& cpu()
{
    static const cpu_level level = chosen_level();
    return level;
}
