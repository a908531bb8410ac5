// Includes nothing with inline functions: see cpu.h.  All is computed in dlib's order, so that it is rounded as there.
#include "resize_kernels.h"

namespace
{
    long min(const long a, const long b) { return a < b ? a : b; }

    // Where a row of the output lies: between two of the input, at a fraction of the way down.
    struct position
    {
        long top, bottom;
        double down;
    };

    class positions
    {
    public:
        positions(const resize_shape& shape, const long begin) : last(shape.in_rows - 1),
            scale(last / (double)(shape.out_rows > 1 ? shape.out_rows - 1 : 1)), y(0)
        {
            for (long r = 0; r < begin; ++r)
                y += scale;
        }

        position next()
        {
            const long top = (long)y;
            const position here = {top, min(top + 1, last), y - top};
            y += scale;
            return here;
        }

    private:
        const long last;
        const double scale;
        double y;
    };

    template <typename T>
    void load_pairs(T* __restrict const pairs, const T* const row, const resize_shape& shape)
    {
        for (long c = 0; c < shape.num; ++c)
        {
            pairs[2 * c] = row[shape.lefts[c]];
            pairs[2 * c + 1] = row[shape.lefts[c] + 1];
        }
    }

    template <typename T>
    void interpolate(T* __restrict const out, const T* const above, const T* const below, const resize_shape& shape,
        const float up, const float down)
    {
        #pragma GCC ivdep
        for (long c = 0; c < shape.num; ++c)
        {
            const float right = shape.fractions[c], left = 1 - right;
            out[c] = (T)(up * left * above[2 * c] + up * right * above[2 * c + 1] + down * left * below[2 * c]
                + down * right * below[2 * c + 1]);
        }
    }

    // real is the type of dlib's fractions there.
    template <typename T, typename real>
    void interpolate_last_columns(T* const out, const T* const above, const T* const below, const resize_shape& shape,
        const double down)
    {
        const double x_scale = (shape.in_columns - 1) / (double)(shape.out_columns > 1 ? shape.out_columns - 1 : 1);
        double x = -x_scale + shape.num * x_scale;
        for (long c = shape.num; c < shape.out_columns; ++c)
        {
            x += x_scale;
            const long left = (long)x, right = min(left + 1, shape.in_columns - 1);
            const real fraction = x - left;
            out[c] = (T)((1 - down) * ((1 - fraction) * (real)above[left] + fraction * (real)above[right])
                + down * ((1 - fraction) * (real)below[left] + fraction * (real)below[right]));
        }
    }

    template <typename T, typename real>
    void resize_rows(T* const out, const T* const in, const resize_shape& shape, const long begin, const long end,
        T* const space)
    {
        for (long k = 0; k < shape.num_planes; ++k)
        {
            // What was the row below often is the row above of the next.
            T *pairs_above = space, *pairs_below = space + 2 * shape.num;
            const T *loaded_above = nullptr, *loaded_below = nullptr;
            positions rows(shape, begin);
            for (long r = begin; r < end; ++r)
            {
                const position p = rows.next();
                const T* const above = in + k * shape.in_plane_step + p.top * shape.in_row_step;
                const T* const below = in + k * shape.in_plane_step + p.bottom * shape.in_row_step;
                if (above == loaded_below && above != loaded_above)
                {
                    T* const swapped = pairs_above;
                    pairs_above = pairs_below;
                    pairs_below = swapped;
                }
                else if (above != loaded_above)
                    load_pairs(pairs_above, above, shape);
                if (above != loaded_above || below != loaded_below)
                    load_pairs(pairs_below, below, shape);
                loaded_above = above;
                loaded_below = below;

                T* const row = out + k * shape.out_plane_step + r * shape.out_row_step;
                interpolate(row, pairs_above, pairs_below, shape, 1 - p.down, p.down);
                interpolate_last_columns<T, real>(row, above, below, shape, p.down);
            }
        }
    }

#ifdef __AVX2__
    typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
    typedef int ints __attribute__((vector_size(32), aligned(4), may_alias));
    typedef int unaligned_int __attribute__((aligned(1), may_alias));
    typedef char chars __attribute__((vector_size(32)));
    typedef long long two_longs __attribute__((vector_size(16), aligned(1), may_alias));

    // Eight of the 16 pixels from the first on.
    floats pick(const unsigned char* const first, const ints offsets)
    {
        const two_longs row = *(const two_longs*)first;
        const auto twice = __builtin_shufflevector(row, row, 0, 1, 0, 1);
        const ints high_bytes_zero = offsets | ~255;
        return __builtin_convertvector((ints)__builtin_ia32_pshufb256((chars)twice, (chars)high_bytes_zero), floats);
    }

    // Without pairs: eight columns of all planes at a time, if they lie within 16 of the input.
    void resize_byte_rows(unsigned char* const out, const unsigned char* const in, const resize_shape& by_reference,
        const long begin, const long end, unsigned char* const space)
    {
        const resize_shape shape = by_reference; // as the compiler reads it again whenever a byte is written
        const long group = 8, span = 16;
        if (shape.num < group || shape.in_columns < span || 5 * (shape.in_columns - 1) > 9 * (shape.out_columns - 1))
            return resize_rows<unsigned char, double>(out, in, shape, begin, end, space);

        positions rows(shape, begin);
        for (long r = begin; r < end; ++r)
        {
            const position p = rows.next();
            const float up = 1 - p.down, down = p.down;
            const long above = p.top * shape.in_row_step, below = p.bottom * shape.in_row_step;
            for (long i = 0; i < shape.num; i += group)
            {
                const long c = min(i, shape.num - group);
                const long first = min(shape.lefts[c], shape.in_columns - span);
                const ints lefts = *(const ints*)(shape.lefts + c) - (int)first, rights = lefts + 1;
                const floats right = *(const floats*)(shape.fractions + c), left = 1 - right;
                for (long k = 0; k < shape.num_planes; ++k)
                {
                    const unsigned char* const plane = in + k * shape.in_plane_step + first;
                    const floats pixels = up * left * pick(plane + above, lefts)
                        + up * right * pick(plane + above, rights) + down * left * pick(plane + below, lefts)
                        + down * right * pick(plane + below, rights);
                    const chars low_bytes = {0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 8, 12};
                    const chars whole = (chars)__builtin_convertvector(pixels, ints);
                    const ints bytes = (ints)__builtin_ia32_pshufb256(whole, low_bytes);
                    unsigned char* const row = out + k * shape.out_plane_step + r * shape.out_row_step;
                    unaligned_int* const to = (unaligned_int*)(row + c);
                    to[0] = bytes[0];
                    to[1] = bytes[4];
                }
            }
            for (long k = 0; k < shape.num_planes; ++k)
                interpolate_last_columns<unsigned char, double>(out + k * shape.out_plane_step + r * shape.out_row_step,
                    in + k * shape.in_plane_step + above, in + k * shape.in_plane_step + below, shape, p.down);
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
