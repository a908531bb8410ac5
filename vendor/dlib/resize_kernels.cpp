// Uses no inline functions of other headers: see cpu.h.  All is computed in dlib's order, so that it is rounded as there.
#include "resize_kernels.h"
#include "lanes.h"

namespace
{
    template <typename T>
    void load_pairs(T* __restrict const pairs, const T* const row, const resize_map& map)
    {
        for (long c = 0; c < map.num; ++c)
        {
            pairs[2 * c] = row[map.lefts[c]];
            pairs[2 * c + 1] = row[map.lefts[c] + 1];
        }
    }

    template <typename T>
    void interpolate(T* __restrict const out, const T* const above, const T* const below, const resize_map& map,
        const float up, const float down)
    {
        for (long c = 0; c < map.num; ++c)
        {
            const float right = map.fractions[c], left = 1 - right;
            out[c] = (T)(up * left * above[2 * c] + up * right * above[2 * c + 1] + down * left * below[2 * c]
                + down * right * below[2 * c + 1]);
        }
    }

    // real is the type of dlib's fractions there.
    template <typename T, typename real>
    void interpolate_last_columns(const planes<T>& out, const planes<T>& in, const resize_map& map, const long k,
        const long r)
    {
        const long top = (long)map.ys[r];
        const double down = map.ys[r] - top;
        const T *const above = in.row(k, top), *const below = in.row(k, min(top + 1, in.rows - 1));
        T* const row = out.row(k, r);
        for (long c = map.num; c < out.columns; ++c)
        {
            const double x = map.last_xs[c - map.num];
            const long left = (long)x, right = min(left + 1, in.columns - 1);
            const real fraction = x - left;
            row[c] = (T)((1 - down) * ((1 - fraction) * (real)above[left] + fraction * (real)above[right])
                + down * ((1 - fraction) * (real)below[left] + fraction * (real)below[right]));
        }
    }

    template <typename T, typename real>
    void resize_rows(const planes<T>& out, const planes<T>& in, const resize_map& map, const long begin, const long end,
        T* const space)
    {
        for (long k = 0; k < out.num; ++k)
        {
            // What was the row below often is the row above of the next.
            T *pairs_above = space, *pairs_below = space + 2 * map.num;
            const T *loaded_above = nullptr, *loaded_below = nullptr;
            for (long r = begin; r < end; ++r)
            {
                const long top = (long)map.ys[r];
                const T *const above = in.row(k, top), *const below = in.row(k, min(top + 1, in.rows - 1));
                if (above != loaded_above)
                {
                    if (above == loaded_below)
                    {
                        T* const swapped = pairs_above;
                        pairs_above = pairs_below;
                        pairs_below = swapped;
                    }
                    else
                        load_pairs(pairs_above, above, map);
                    load_pairs(pairs_below, below, map);
                }
                loaded_above = above;
                loaded_below = below;

                const double down = map.ys[r] - top;
                interpolate(out.row(k, r), pairs_above, pairs_below, map, 1 - down, down);
                interpolate_last_columns<T, real>(out, in, map, k, r);
            }
        }
    }

#ifdef __AVX2__
    typedef several<8>::floats eight_floats;
    typedef int ints __attribute__((vector_size(32), aligned(4), may_alias));
    typedef int unaligned_int __attribute__((aligned(1), may_alias));
    typedef char chars __attribute__((vector_size(32)));
    typedef long long two_longs __attribute__((vector_size(16), aligned(1), may_alias));

    // Eight of the 16 pixels from the first on.
    eight_floats pick(const unsigned char* const first, const ints offsets)
    {
        const two_longs row = *(const two_longs*)first;
        const auto twice = __builtin_shufflevector(row, row, 0, 1, 0, 1);
        const ints high_bytes_zero = offsets | ~255;
        const auto picked = __builtin_ia32_pshufb256((chars)twice, (chars)high_bytes_zero);
        return __builtin_convertvector((ints)picked, eight_floats);
    }

    // Without pairs: eight columns of all planes at a time, if they lie within 16 of the input.
    void resize_byte_rows(const planes<unsigned char>& out_, const planes<unsigned char>& in_, const resize_map& map_,
        const long begin, const long end, unsigned char* const space)
    {
        // Of a reference, the compiler reads all again whenever a byte is written.
        const planes<unsigned char> out = out_, in = in_;
        const resize_map map = map_;
        const long group = 8, span = 16;
        if (map.num < group || in.columns < span || 5 * (in.columns - 1) > 9 * (out.columns - 1))
            return resize_rows<unsigned char, double>(out, in, map, begin, end, space);

        for (long r = begin; r < end; ++r)
        {
            const long top = (long)map.ys[r], bottom = min(top + 1, in.rows - 1);
            const double fraction = map.ys[r] - top;
            const float up = 1 - fraction, down = fraction;
            for (long i = 0; i < map.num; i += group)
            {
                const long c = min(i, map.num - group), first = min(map.lefts[c], in.columns - span);
                const ints lefts = *(const ints*)(map.lefts + c) - (int)first, rights = lefts + 1;
                const eight_floats right = *(const eight_floats*)(map.fractions + c), left = 1 - right;
                for (long k = 0; k < out.num; ++k)
                {
                    const unsigned char *const above = in.row(k, top) + first, *const below = in.row(k, bottom) + first;
                    const eight_floats pixels = up * left * pick(above, lefts) + up * right * pick(above, rights)
                        + down * left * pick(below, lefts) + down * right * pick(below, rights);
                    const chars low_bytes = {0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 8, 12};
                    const chars whole = (chars)__builtin_convertvector(pixels, ints);
                    const ints bytes = (ints)__builtin_ia32_pshufb256(whole, low_bytes);
                    unaligned_int* const row = (unaligned_int*)(out.row(k, r) + c);
                    row[0] = bytes[0];
                    row[1] = bytes[4];
                }
            }
            for (long k = 0; k < out.num; ++k)
                interpolate_last_columns<unsigned char, double>(out, in, map, k, r);
        }
    }
#else
    const auto resize_byte_rows = resize_rows<unsigned char, double>;
#endif
}

namespace LEVEL
{
    extern const resize_kernels resizing = {resize_byte_rows, resize_rows<float, float>};
}
