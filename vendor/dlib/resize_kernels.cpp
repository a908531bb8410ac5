// Includes nothing with inline functions: see cpu.h.  All that is rounded here is rounded in dlib's order, so that it
// is the same.
#include "resize_kernels.h"

namespace
{
    long min(const long a, const long b) { return a < b ? a : b; }

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
    void interpolate(T* __restrict const out, const T* const above, const T* const below, const float* const fractions,
        const long num, const float up, const float down)
    {
        #pragma GCC ivdep
        for (long c = 0; c < num; ++c)
        {
            const float right = fractions[c], left = 1 - right;
            out[c] = (T)(up * left * above[2 * c] + up * right * above[2 * c + 1] + down * left * below[2 * c]
                + down * right * below[2 * c + 1]);
        }
    }

    // real is the type in which dlib computes the last columns.
    template <typename T, typename real>
    void resize_rows(T* const out, const long out_step, const T* const in, const long in_step, const resize_shape& shape,
        const long begin, const long end, T* const space)
    {
        const long num = shape.num;
        const double x_scale = (shape.in_columns - 1) / (double)(shape.out_columns > 1 ? shape.out_columns - 1 : 1);
        const double y_scale = (shape.in_rows - 1) / (double)(shape.out_rows > 1 ? shape.out_rows - 1 : 1);
        // What was the row below often is the row above of the next.
        T *pairs_above = space, *pairs_below = space + 2 * num;
        long loaded = -1; // into pairs_below
        double y = 0;
        for (long r = 0; r < end; ++r, y += y_scale)
        {
            if (r < begin)
                continue;
            const long top = (long)y, bottom = min(top + 1, shape.in_rows - 1);
            const double down = y - top;
            const T *const above = in + top * in_step, *const below = in + bottom * in_step;
            if (loaded != bottom || top == bottom)
            {
                if (loaded == top)
                {
                    T* const swapped = pairs_above;
                    pairs_above = pairs_below;
                    pairs_below = swapped;
                }
                else
                    load_pairs(pairs_above, above, shape);
                load_pairs(pairs_below, below, shape);
                loaded = bottom;
            }

            T* const row = out + r * out_step;
            interpolate(row, pairs_above, pairs_below, shape.fractions, num, 1 - down, down);
            double x = -x_scale + num * x_scale;
            for (long c = num; c < shape.out_columns; ++c)
            {
                x += x_scale;
                const long left = (long)x, right = min(left + 1, shape.in_columns - 1);
                const real from_left = x - left;
                row[c] = (T)((1 - down) * ((1 - from_left) * (real)above[left] + from_left * (real)above[right])
                    + down * ((1 - from_left) * (real)below[left] + from_left * (real)below[right]));
            }
        }
    }
}

namespace LEVEL
{
    extern const resize_kernels resizing = {resize_rows<unsigned char, double>, resize_rows<float, float>};
}
