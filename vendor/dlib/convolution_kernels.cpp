// Uses no inline functions of other headers: see cpu.h.  Products are added without rounding them first where the
// processor can (-ffp-contract=fast), as in any BLAS.
#include "convolution_kernels.h"
#include "lanes.h"

namespace
{
    // The largest tile of positions x filters that stays in the registers.
#if defined(__AVX512F__)
    const int most_across = 3, most_filters = 9;
#elif defined(__AVX__)
    const int most_across = 3, most_filters = 4;
#elif defined(__aarch64__)
    const int most_across = 3, most_filters = 7;
#else
    const int most_across = 3, most_filters = 3;
#endif
    const long block_size = lanes * most_across;

    template <int num_filters, int across>
    void multiply_tile(float* const sums, const long sum_step, const float* const in, const long* const offsets,
        const long depth, const float* const weights)
    {
        floats tile[num_filters][across];
        #pragma GCC unroll 16
        for (int f = 0; f < num_filters; ++f)
            for (int i = 0; i < across; ++i)
                tile[f][i] = floats{};
        for (long j = 0; j < depth; ++j)
        {
            floats pixels[across];
            for (int i = 0; i < across; ++i)
                pixels[i] = *(const floats*)(in + offsets[j] + i * lanes);
            for (int f = 0; f < num_filters; ++f)
            {
                for (int i = 0; i < across; ++i)
                    tile[f][i] += weights[f * depth + j] * pixels[i];
            }
        }
        #pragma GCC unroll 16
        for (int f = 0; f < num_filters; ++f)
            for (int i = 0; i < across; ++i)
                *(floats*)(sums + f * sum_step + i * lanes) = tile[f][i];
    }

    typedef void (*multiply_function)(float*, long, const float*, const long*, long, const float*);

    template <int most>
    multiply_function multiply_for(const long num_filters, const long count)
    {
        return num_filters < most ? multiply_for<most - 1>(num_filters, count) :
            count <= lanes ? &multiply_tile<most, 1> :
            count <= block_size - lanes ? &multiply_tile<most, most_across - 1> : &multiply_tile<most, most_across>;
    }

    template <>
    multiply_function multiply_for<0>(long, long) { return nullptr; }

    // In groups of about the same size, as many filters as fit into the registers.
    void multiply(float* const sums, const long sum_step, const float* const in, const long* const offsets,
        const long depth, const float* const weights, const long num_filters, const long count)
    {
        const long num_groups = (num_filters + most_filters - 1) / most_filters;
        for (long g = 0; g < num_groups; ++g)
        {
            const long begin = g * num_filters / num_groups, end = (g + 1) * num_filters / num_groups;
            multiply_for<most_filters>(end - begin, count)(
                sums + begin * sum_step, sum_step, in, offsets, depth, weights + begin * depth);
        }
    }

    // Evaluates the polynomial d[0..side-1] at each of Winograd's points, times what winograd_filters() (in
    // convolution.cpp) divides by.
    template <int side>
    void input_at_points(floats* const out, const long step, const floats* const d)
    {
        const floats last = d[side - 1], before = d[side - 2];
        if (side == 6)
        {
            const floats even1 = before - 4 * d[2], odd1 = d[3] - 4 * d[1];
            const floats even2 = before - d[2], odd2 = 2 * (d[3] - d[1]);
            out[0] = before - 5 * d[2] + 4 * d[0];
            out[1 * step] = even1 + odd1;
            out[2 * step] = even1 - odd1;
            out[3 * step] = even2 + odd2;
            out[4 * step] = even2 - odd2;
            out[5 * step] = last - 5 * d[3] + 4 * d[1];
        }
        else
        {
            const floats even1 = before - 4.25f * d[4] + d[2], odd1 = d[5] - 4.25f * d[3] + d[1];
            const floats even2 = before - 1.25f * d[4] + 0.25f * d[2], odd2 = 2 * (d[5] - 1.25f * d[3]) + 0.5f * d[1];
            const floats even3 = before - 5 * d[4] + 4 * d[2], odd3 = 0.5f * (d[5] - 5 * d[3]) + 2 * d[1];
            out[0] = before - d[0] + 5.25f * (d[2] - d[4]);
            out[1 * step] = even1 + odd1;
            out[2 * step] = even1 - odd1;
            out[3 * step] = even2 + odd2;
            out[4 * step] = even2 - odd2;
            out[5 * step] = even3 + odd3;
            out[6 * step] = even3 - odd3;
            out[7 * step] = last - d[1] + 5.25f * (d[3] - d[5]);
        }
    }

    // The inverse: four values of output from the products at the points.
    template <int side>
    void output_from_points(floats* const out, const long step, const floats* const m)
    {
        const floats sum1 = m[1] + m[2], sum2 = m[3] + m[4];
        const floats diff1 = m[1] - m[2], diff2 = m[3] - m[4];
        out[0] = m[0] + sum1 + sum2;
        out[1 * step] = diff1 + 2 * diff2;
        out[2 * step] = sum1 + 4 * sum2;
        out[3 * step] = diff1 + 8 * diff2 + m[side - 1];
        if (side == 8)
        {
            const floats sum3 = m[5] + m[side - 2], diff3 = m[5] - m[side - 2];
            out[0] += sum3;
            out[1 * step] += 0.5f * diff3;
            out[2 * step] += 0.25f * sum3;
            out[3 * step] += 0.125f * diff3;
        }
    }

    template <int side>
    void squares_to_points(float* const out, const long step, const float* const in, const long* const offsets)
    {
        for (long i = 0; i < block_size; i += lanes)
        {
            alignas(64) floats rows[side][side], line[side];
            for (int x = 0; x < side; ++x)
            {
                for (int y = 0; y < side; ++y)
                    line[y] = *(const floats*)(in + i + offsets[side * y + x]);
                input_at_points<side>(&rows[0][x], side, line);
            }
            for (int y = 0; y < side; ++y)
            {
                input_at_points<side>(line, 1, rows[y]);
                for (int x = 0; x < side; ++x)
                    *(floats*)(out + (side * y + x) * step + i) = line[x];
            }
        }
    }

    template <int side>
    void points_to_squares(float* const out, const float* const in, const long step)
    {
        for (long i = 0; i < block_size; i += lanes)
        {
            alignas(64) floats rows[square_size][side], line[side];
            for (int x = 0; x < side; ++x)
            {
                for (int y = 0; y < side; ++y)
                    line[y] = *(const floats*)(in + i + (side * y + x) * step);
                output_from_points<side>(&rows[0][x], side, line);
            }
            for (int y = 0; y < square_size; ++y)
            {
                output_from_points<side>(line, 1, rows[y]);
                for (int j = 0; j < lanes; ++j)
                    for (int x = 0; x < square_size; ++x)
                        out[(y * block_size + i + j) * square_size + x] = line[x][j];
            }
        }
    }

    template <int step>
    void deal_whole(float* const out, const long plane, const float* const in, const long begin, const long end)
    {
        #pragma GCC ivdep
        for (long i = begin; i < end; ++i)
            for (int j = 0; j < step; ++j)
                out[j * plane + i] = in[i * step + j];
    }

    void deal(float* const out, const long plane, const float* const in, const long n, const long step, const long left,
        const long right)
    {
        const auto deal_any = [=](const long begin, const long end)
        {
            for (long i = begin; i < end; ++i)
                for (long j = 0; j < step; ++j)
                    out[j * plane + i] = left <= i * step + j && i * step + j < right ? in[i * step + j] : 0;
        };
        // Between these two, all of a step's values lie within [left, right).
        const long begin = min((left + step - 1) / step, n), end = max(begin, min(right / step, n));
        deal_any(0, begin);
        switch (step)
        {
            case 1: deal_whole<1>(out, plane, in, begin, end); break;
            case 2: deal_whole<2>(out, plane, in, begin, end); break;
            case 4: deal_whole<4>(out, plane, in, begin, end); break;
            case 8: deal_whole<8>(out, plane, in, begin, end); break;
            default: deal_any(begin, end);
        }
        deal_any(end, n);
    }

    void store(float* const out, const float* const values, const long n, const float bias, const bool add,
        const float least)
    {
        #pragma GCC ivdep
        for (long i = 0; i < n; ++i)
        {
            const float value = (add ? out[i] + values[i] : values[i]) + bias;
            out[i] = value < least ? least : value;
        }
    }
}

namespace LEVEL
{
    extern const convolution_kernels convolution = {block_size, multiply, {squares_to_points<6>, squares_to_points<8>},
        {points_to_squares<6>, points_to_squares<8>}, deal, store};
}
