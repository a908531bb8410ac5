#pragma once

// What all kernels use; in an anonymous namespace, so that each level of CPU has its own (cpu.h).
namespace
{
    // How many floats a register holds.
#if defined(__AVX512F__)
    const int lanes = 16;
#elif defined(__AVX__)
    const int lanes = 8;
#else
    const int lanes = 4;
#endif
    template <int num>
    struct several
    {
        typedef float floats __attribute__((vector_size(4 * num), aligned(4), may_alias));
    };
    typedef several<lanes>::floats floats;

    inline long min(const long a, const long b) { return a < b ? a : b; }
    inline long max(const long a, const long b) { return a > b ? a : b; }
}
