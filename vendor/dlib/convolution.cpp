#include "convolution.h"
#include "cpu.h"
#include "threads.h"
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>

namespace
{
    typedef std::unique_ptr<float[]> floats; // not a vector, as zeroing one takes a tenth of the time of a small layer

    // How an image is dealt out to planes.
    //
    // What is computed side by side are positions: pixels of the output, or squares of them.  From one to the next, rows
    // and columns of the input step on by a number of pixels.  So they are dealt out like cards to so many planes: there,
    // pixels of neighbouring positions are neighbours.
    //
    // Positions are counted row by row, those between the end of a row and the beginning of the next included: they are
    // computed, as that is simpler, and dropped.  A strip is a number of positions whose planes fit into the processor's
    // cache.  A wide image is cut into several columns of strips.
    struct dealing
    {
        dealing(const planes<float>& in_, const long padding_, const long step_, const long reach, const long rows,
            const long columns, const long block_size)
            : in(in_), padding(padding_), step(step_), beyond((reach - 1) / step_)
        {
            const long cached = 512 * 1024 / sizeof(float) / (in.num * step * step);
            const long most_width = std::max(16L, std::lround(8 * std::sqrt(cached)));
            num_columns = (columns + most_width - 1) / most_width;
            column_width = (columns + num_columns - 1) / num_columns;
            width = column_width + beyond;
            num_positions = rows * width - beyond;
            strip_size = std::max(1L, (cached - (beyond + 1) * width) / block_size) * block_size;
            num_strips = (num_positions + strip_size - 1) / strip_size;
            plane = ((strip_size - 1) / width + 2 + beyond) * width;
        }

        // Where a pixel of the input is, seen from that of the position's first row and column in plane 0.
        long offset(const long k, const long y, const long x) const
        {
            return ((k * step + y % step) * step + x % step) * plane + y / step * width + x / step;
        }

        const planes<float> in;
        const long padding;
        const long step;   // from a position to the next, in pixels of input
        const long beyond; // how many positions' rows and columns are needed beyond the last
        long num_columns, column_width; // in positions
        long width;        // of a dealt row, in positions
        long num_positions, strip_size, num_strips; // in a column
        long plane;        // the size of one
    };

    // The strips that one thread computes, one after the other, and their pixels.
    class strips
    {
    public:
        strips(const dealing& dealt, const long first, const long last, const long num_filters, const long num_parts)
            : dealt(dealt), number(first - 1), last(last), num_filters(num_filters), num_parts(num_parts),
            pixels(new float[dealt.in.num * dealt.step * dealt.step * dealt.plane + kernels.block_size]) {}

        // Goes to the next one, and deals its rows out.  Returns false if there is none.
        bool next()
        {
            if (++number == last)
                return false;
            const long num_strips = dealt.num_columns * dealt.num_strips;
            const long task = number % num_strips, part = number / num_strips;
            first_filter = part * num_filters / num_parts;
            end_filter = (part + 1) * num_filters / num_parts;
            column = task / dealt.num_strips * dealt.column_width;
            begin = task % dealt.num_strips * dealt.strip_size;
            end = std::min(begin + dealt.strip_size, dealt.num_positions);
            deal_rows();
            return true;
        }

        // The pixels of a block of positions, in plane 0.
        const float* at(const long position) const { return &pixels[position - begin / dealt.width * dealt.width]; }

        // Stores the values of the positions from first on, each a square of so many pixels, in a plane of the output.
        void store(const planes<float>& out, const long plane, const float* const values, const long first,
            const long square, const float bias, const bool add, const float least) const
        {
            const long last = std::min(first + kernels.block_size, end), width = dealt.width;
            for (long i = first; i < last; i = (i / width + 1) * width)
            {
                const long r = i / width * square, c = (column + i % width) * square;
                const long n = std::min(std::min(last - i, dealt.column_width - i % width) * square, out.columns - c);
                for (long y = 0; y < square && r + y < out.rows; ++y)
                    kernels.store(out.row(plane, r + y) + c, values + (y * kernels.block_size + i - first) * square, n,
                        bias, add, least);
            }
        }

        long first_filter, end_filter; // to be applied
        long begin, end; // positions

    private:
        // If it goes on where the strip before has ended, the rows that both need are moved rather than dealt again.
        void deal_rows()
        {
            const long first_row = begin / dealt.width, step = dealt.step;
            const long end_row = (end - 1) / dealt.width + 1 + dealt.beyond;
            const long kept = begin == 0 ? 0 : std::max(0L, dealt_end - first_row);
            const long left = dealt.padding - column * step;
            const long right = left + dealt.in.columns;
            for (long k = 0; k < dealt.in.num; ++k)
                for (long y = 0; y < step; ++y)
                {
                    float* const p = &pixels[(k * step + y) * step * dealt.plane];
                    for (long x = 0; kept > 0 && x < step; ++x)
                        std::copy_n(p + x * dealt.plane + (first_row - dealt_begin) * dealt.width, kept * dealt.width,
                            p + x * dealt.plane);
                    for (long row = first_row + kept; row < end_row; ++row)
                    {
                        const long r = row * step + y - dealt.padding;
                        const bool inside = 0 <= r && r < dealt.in.rows;
                        kernels.deal(p + (row - first_row) * dealt.width, dealt.plane,
                            dealt.in.row(k, inside ? r : 0) - left, dealt.width, step, std::max(left, 0L),
                            inside ? std::max(right, 0L) : 0);
                    }
                }
            dealt_begin = first_row;
            dealt_end = end_row;
        }

        const convolution_kernels& kernels = *cpu().convolution;
        const dealing& dealt;
        long number; // counts strips, once for each part of the filters
        const long last, num_filters, num_parts;
        const floats pixels;
        long column; // the first position's
        long dealt_begin = 0, dealt_end = 0; // rows
    };

    // Has work compute all strips: threads take shares of them.  Where there are fewer strips than threads,
    // they take parts of the filters, too.
    void for_each_share(const dealing& dealt, const long num_filters, const bool use_threads,
        const std::function<void(strips&)>& work)
    {
        const long threads = use_threads ? num_threads() : 1;
        const long num_strips = dealt.num_columns * dealt.num_strips;
        const long num_parts = std::max(1L, std::min(num_filters, threads / num_strips));
        const long num = num_parts * num_strips;
        const long num_shares = threads == 1 ? 1 : std::min(num, 8 * threads);
        for_each_task(num_shares, [&](const long i)
        {
            strips share(dealt, i * num / num_shares, (i + 1) * num / num_shares, num_filters, num_parts);
            work(share);
        });
    }

    // Winograd's method (Lavin and Gray: Fast Algorithms for Convolutional Neural Networks, 2015).  A square of input
    // is taken as the coefficients of a polynomial and evaluated at the points below and at infinity, along columns and
    // rows; so are the filters.  At each point the products are summed over the channels, and 4 x 4 pixels of output are
    // computed back from these sums.  A square of 6 x 6 serves filters of 3 x 3 with 36 products instead of 144, one of
    // 8 x 8 those of 5 x 5 with 64 instead of 400.
    const double points[] = {0, 1, -1, 2, -2, 0.5, -0.5};

    // The side x (side - 3) matrix that takes a row of a filter to its values at the points.
    std::vector<double> filter_at_points(const long side)
    {
        const long reach = side - 3;
        std::vector<double> m(side * reach);
        m.back() = 1;
        for (long p = 0; p < side - 1; ++p)
        {
            double divisor = 1;
            for (long q = 0; q < side - 1; ++q)
                divisor *= p != q ? points[p] - points[q] : 1;
            for (long i = 0; i < reach; ++i)
                m[p * reach + i] = std::pow(points[p], i) / divisor;
        }
        return m;
    }

    // The filters' values: those of all filters at the first point, then at the next...  With a stride, a filter is like
    // one on as many channels more: those of every second row and column, say.
    std::vector<float> winograd_filters(const filter_bank& filters, const long side)
    {
        const long reach = side - 3, stride = filters.stride, phases = stride * stride;
        const long num = filters.num * filters.depth * phases;
        const std::vector<double> m = filter_at_points(side);
        std::vector<float> values(side * side * num);
        std::vector<double> rows(reach * side);
        for (long i = 0; i < num; ++i)
        {
            const float* const f = filters.values.data() + i / phases * filters.size * filters.size;
            const long y0 = i / stride % stride, x0 = i % stride;
            for (long y = 0; y < reach; ++y)
                for (long p = 0; p < side; ++p)
                {
                    double& sum = rows[y * side + p] = 0;
                    if (y0 + y * stride < filters.size)
                        for (long x = x0; x < filters.size; x += stride)
                            sum += m[p * reach + x / stride] * f[(y0 + y * stride) * filters.size + x];
                }
            for (long q = 0; q < side; ++q)
                for (long p = 0; p < side; ++p)
                {
                    double sum = 0;
                    for (long y = 0; y < reach; ++y)
                        sum += m[q * reach + y] * rows[y * side + p];
                    values[(q * side + p) * num + i] = sum;
                }
        }
        return values;
    }
}

convolution::convolution(const filter_bank& filters, const bool relu, const method how)
    : filter_bank(filters), side(how == method::direct ? 0 : (size + stride - 1) / stride == 3 ? 6 : 8),
    least(relu ? 0 : -std::numeric_limits<float>::infinity())
{
    if (side)
        values = winograd_filters(filters, side);
}

void convolution::operator()(const planes<float>& out, const planes<float>& in, const bool use_threads,
    const bool add) const
{
    if (side)
        by_winograd(out, in, use_threads, add);
    else
        directly(out, in, use_threads, add);
}

void convolution::directly(const planes<float>& out, const planes<float>& in, const bool use_threads,
    const bool add) const
{
    const convolution_kernels& kernels = *cpu().convolution;
    const long block_size = kernels.block_size;
    const dealing dealt(in, padding, stride, size, out.rows, out.columns, block_size);
    std::vector<long> offsets; // of the pixels that a filter's values are multiplied with
    for (long k = 0; k < depth; ++k)
        for (long y = 0; y < size; ++y)
            for (long x = 0; x < size; ++x)
                offsets.push_back(dealt.offset(k, y, x));
    const long products = offsets.size();

    for_each_share(dealt, num, use_threads, [&](strips& s)
    {
        const floats sums(new float[num * block_size]);
        while (s.next())
            for (long b = s.begin; b < s.end; b += block_size)
            {
                kernels.multiply(&sums[0], block_size, s.at(b), offsets.data(), products,
                    &values[s.first_filter * products], s.end_filter - s.first_filter, std::min(block_size, s.end - b));
                for (long f = s.first_filter; f < s.end_filter; ++f)
                    s.store(out, f, &sums[(f - s.first_filter) * block_size], b, 1, biases[f], add, least);
            }
    });
}

void convolution::by_winograd(const planes<float>& out, const planes<float>& in, const bool use_threads,
    const bool add) const
{
    const convolution_kernels& kernels = *cpu().convolution;
    const long block_size = kernels.block_size, num_points = side * side;
    const auto squares = [](const long pixels) { return (pixels + square_size - 1) / square_size; };
    const dealing dealt(in, padding, square_size * stride, stride * (side - 1) + 1, squares(out.rows), squares(out.columns),
        block_size);
    std::vector<long> square; // offsets of a square's pixels
    for (long y = 0; y < side; ++y)
        for (long x = 0; x < side; ++x)
            square.push_back(dealt.offset(0, y * stride, x * stride));
    std::vector<long> channels, offsets; // of their squares' first pixels, and of their values at a point
    for (long k = 0; k < depth; ++k)
        for (long y = 0; y < stride; ++y)
            for (long x = 0; x < stride; ++x)
            {
                offsets.push_back(channels.size() * block_size);
                channels.push_back(dealt.offset(k, y, x));
            }
    const long products = channels.size();
    // From one point's values to the next's.  A multiple of 4096 bytes, as with 128 channels, would have all points share
    // a few sets of the first cache: so a line is left free in between.
    const long cache_line = 64 / sizeof(float);
    const long point_step = products * block_size + cache_line, sum_step = num * block_size + cache_line;
    const auto to_points = kernels.squares_to_points[side == 8];
    const auto to_squares = kernels.points_to_squares[side == 8];

    for_each_share(dealt, num, use_threads, [&](strips& s)
    {
        const floats at_points(new float[num_points * point_step]), sums(new float[num_points * sum_step]);
        const floats pixels(new float[square_size * square_size * block_size]);
        while (s.next())
            for (long b = s.begin; b < s.end; b += block_size)
            {
                for (long i = 0; i < products; ++i)
                    to_points(&at_points[i * block_size], point_step, s.at(b) + channels[i], square.data());
                // Point by point, so that the pixels at it stay in the first cache for all filters.
                for (long p = 0; p < num_points; ++p)
                    kernels.multiply(&sums[p * sum_step], block_size, &at_points[p * point_step], offsets.data(),
                        products, &values[(p * num + s.first_filter) * products], s.end_filter - s.first_filter,
                        std::min(block_size, s.end - b));
                for (long f = s.first_filter; f < s.end_filter; ++f)
                {
                    to_squares(&pixels[0], &sums[(f - s.first_filter) * block_size], sum_step);
                    s.store(out, f, &pixels[0], b, square_size, biases[f], add, least);
                }
            }
    });
}
