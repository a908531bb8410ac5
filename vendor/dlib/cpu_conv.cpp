// License: Boost Software License   See LICENSE.txt for the full license.
#ifndef DLIB_DNN_CPU_CONV_cPP_
#define DLIB_DNN_CPU_CONV_cPP_

// tensor_conv's forward pass on the CPU.  The image is not unrolled into a matrix: strips of it are copied
// so that the pixels which one value of a filter is multiplied with are neighbours in memory, and a tile
// of pixels x filters is summed up in the processor's registers from there.  Filters that reach over 3 to 5
// pixels are applied by Winograd's method, where images are large enough for that to pay.

#include <dlib/cuda/cpu_dlib.h>
#include <dlib/threads.h>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

// A product is added without rounding it first where the processor can, as in any BLAS, even if the rest of
// dlib is compiled with -ffp-contract=off.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC push_options
#pragma GCC optimize ("fp-contract=fast")
#endif

namespace dlib
{
    namespace cpu
    {
        namespace
        {

        // How many floats a register holds, and the largest tile that stays in the registers there are.
#if defined(__AVX512F__)
        const long lanes = 16;
        const int most_across = 3, most_filters = 9;
#elif defined(__AVX__)
        const long lanes = 8;
        const int most_across = 3, most_filters = 4;
#elif defined(__aarch64__)
        const long lanes = 4;
        const int most_across = 3, most_filters = 8;
#else
        const long lanes = 4;
        const int most_across = 2, most_filters = 6;
#endif
        const long block_size = lanes*most_across;
        typedef float floats __attribute__((vector_size(4*lanes), aligned(4), may_alias));

    // ----------------------------------------------------------------------------------------

        template <int num_filters, int across>
        __attribute__((noinline))
        void multiply_tile (
            float* out,
            const float* in,
            const std::vector<long>& offsets,
            const float* weights
        )
        /*!
            ensures
                - For num_filters filters f and across*lanes pixels i, sets out[f*block_size+i] to the
                  sum over j of weights[f*offsets.size()+j]*in[i+offsets[j]].
        !*/
        {
            const long depth = offsets.size();
            floats sums[num_filters][across] = {};
            for (long j = 0; j < depth; ++j)
            {
                floats pixels[across];
                #pragma GCC unroll 16
                for (int i = 0; i < across; ++i)
                    pixels[i] = *(const floats*)(in + offsets[j] + i*lanes);
                #pragma GCC unroll 16
                for (int f = 0; f < num_filters; ++f)
                {
                    #pragma GCC unroll 16
                    for (int i = 0; i < across; ++i)
                        sums[f][i] += weights[f*depth + j]*pixels[i];
                }
            }
            for (int f = 0; f < num_filters; ++f)
                for (int i = 0; i < across; ++i)
                    *(floats*)(out + f*block_size + i*lanes) = sums[f][i];
        }

        typedef void (*multiply_function)(float*, const float*, const std::vector<long>&, const float*);

        template <int most = most_filters>
        multiply_function multiply_for (const long num_filters, const long num_pixels)
        {
            return num_filters < most ? multiply_for<most-1>(num_filters, num_pixels) :
                num_pixels <= lanes ? &multiply_tile<most, 1> :
                num_pixels <= block_size-lanes ? &multiply_tile<most, most_across-1> : &multiply_tile<most, most_across>;
        }

        template <>
        multiply_function multiply_for<0> (const long, const long) { return nullptr; }

    // ----------------------------------------------------------------------------------------

        // Winograd's method (Lavin and Gray: Fast Algorithms for Convolutional Neural Networks, 2015).
        // A square of input is taken as the coefficients of a polynomial and evaluated at the points below
        // and at infinity, along columns and rows; so are the filters.  At each point the products are
        // summed over the channels, and 4x4 pixels of output are computed back from these sums.  A square
        // of 6x6 serves filters of 3x3 with 36 products instead of 144, one of 8x8 those of 5x5 with 64
        // instead of 400.
        const long tile = 4;
        const double points[] = {0, 1, -1, 2, -2, 0.5, -0.5};

        std::vector<double> filter_at_points (const long side)
        /*!
            ensures
                - Returns the side x (side-3) matrix that takes a row of a filter to its values at the points.
        !*/
        {
            const long size = side-3;
            std::vector<double> m(side*size);
            m.back() = 1;
            for (long p = 0; p < side-1; ++p)
            {
                double scale = 1;
                for (long q = 0; q < side-1; ++q)
                    scale *= p != q ? points[p] - points[q] : 1;
                for (long i = 0; i < size; ++i)
                    m[p*size + i] = std::pow(points[p], i)/scale;
            }
            return m;
        }

        template <int side>
        void input_at_points (floats* out, const long step, const floats* d)
        /*!
            ensures
                - Evaluates the polynomial d[0..side-1] at each point, times what filter_at_points() divides by.
        !*/
        {
            const floats last = d[side-1], before = d[side-2];
            if (side == 6)
            {
                const floats even1 = before - 4*d[2], odd1 = d[3] - 4*d[1];
                const floats even2 = before - d[2], odd2 = 2*(d[3] - d[1]);
                out[0] = before - 5*d[2] + 4*d[0];
                out[1*step] = even1 + odd1;
                out[2*step] = even1 - odd1;
                out[3*step] = even2 + odd2;
                out[4*step] = even2 - odd2;
                out[5*step] = last - 5*d[3] + 4*d[1];
            }
            else
            {
                const floats even1 = before - 4.25f*d[4] + d[2], odd1 = d[5] - 4.25f*d[3] + d[1];
                const floats even2 = before - 1.25f*d[4] + 0.25f*d[2], odd2 = 2*(d[5] - 1.25f*d[3]) + 0.5f*d[1];
                const floats even3 = before - 5*d[4] + 4*d[2], odd3 = 0.5f*(d[5] - 5*d[3]) + 2*d[1];
                out[0] = before - d[0] + 5.25f*(d[2] - d[4]);
                out[1*step] = even1 + odd1;
                out[2*step] = even1 - odd1;
                out[3*step] = even2 + odd2;
                out[4*step] = even2 - odd2;
                out[5*step] = even3 + odd3;
                out[6*step] = even3 - odd3;
                out[7*step] = last - d[1] + 5.25f*(d[3] - d[5]);
            }
        }

        template <int side>
        void output_from_points (floats* out, const long step, const floats* m)
        {
            const floats sum1 = m[1] + m[2], sum2 = m[3] + m[4];
            const floats diff1 = m[1] - m[2], diff2 = m[3] - m[4];
            out[0] = m[0] + sum1 + sum2;
            out[1*step] = diff1 + 2*diff2;
            out[2*step] = sum1 + 4*sum2;
            out[3*step] = diff1 + 8*diff2 + m[side-1];
            if (side == 8)
            {
                const floats sum3 = m[5] + m[side-2], diff3 = m[5] - m[side-2];
                out[0] += sum3;
                out[1*step] += 0.5f*diff3;
                out[2*step] += 0.25f*sum3;
                out[3*step] += 0.125f*diff3;
            }
        }

        template <int side>
        __attribute__((noinline))
        void squares_to_points (float* out, const long out_step, const float* in, const long* offsets)
        /*!
            ensures
                - For block_size squares i, whose j-th pixel is in[i+offsets[j]], sets out[j*out_step+i]
                  to the square's value at the j-th of the side*side points.
        !*/
        {
            for (long i = 0; i < block_size; i += lanes)
            {
                alignas(64) floats rows[side][side], line[side];
                for (int x = 0; x < side; ++x)
                {
                    for (int y = 0; y < side; ++y)
                        line[y] = *(const floats*)(in + i + offsets[side*y + x]);
                    input_at_points<side>(&rows[0][x], side, line);
                }
                for (int y = 0; y < side; ++y)
                {
                    input_at_points<side>(line, 1, rows[y]);
                    for (int x = 0; x < side; ++x)
                        *(floats*)(out + (side*y + x)*out_step + i) = line[x];
                }
            }
        }

        template <int side>
        __attribute__((noinline))
        void points_to_tiles (float* out, const float* in, const long in_step)
        /*!
            ensures
                - For block_size tiles i, whose sum at the j-th point is in[j*in_step+i], sets the tile's
                  rows of output pixels: out[(y*block_size+i)*tile+x] for x and y from 0 to tile-1.
        !*/
        {
            for (long i = 0; i < block_size; i += lanes)
            {
                alignas(64) floats rows[tile][side], line[side];
                for (int x = 0; x < side; ++x)
                {
                    for (int y = 0; y < side; ++y)
                        line[y] = *(const floats*)(in + i + (side*y + x)*in_step);
                    output_from_points<side>(&rows[0][x], side, line);
                }
                for (int y = 0; y < tile; ++y)
                {
                    output_from_points<side>(line, 1, rows[y]);
                    for (int j = 0; j < lanes; ++j)
                        for (int x = 0; x < tile; ++x)
                            out[(y*block_size + i + j)*tile + x] = line[x][j];
                }
            }
        }

    // ----------------------------------------------------------------------------------------

        template <int step>
        void deal (float* out, const long plane, const float* in, const long n)
        {
            #pragma GCC ivdep
            for (long i = 0; i < n; ++i)
                for (int j = 0; j < step; ++j)
                    out[j*plane + i] = in[i*step + j];
        }

        void deal (
            float* out,
            const long plane,
            const long num_planes,
            const float* in,
            const long n,
            const long step,
            const long left,
            const long right
        )
        /*!
            ensures
                - Deals a row out to planes, like cards: for all i < n and j < num_planes, out[j*plane+i]
                  becomes in[i*step+j], or 0 if i*step+j isn't within [left,right).
        !*/
        {
            const auto deal_slowly = [&](const long begin, const long end)
            {
                for (long i = begin; i < end; ++i)
                    for (long j = 0; j < num_planes; ++j)
                        out[j*plane + i] = left <= i*step+j && i*step+j < right ? in[i*step + j] : 0;
            };
            // Between these two, all of a step's values lie within [left,right).
            const long begin = std::min((left + step-1)/step, n);
            const long end = std::max(begin, std::min(right/step, n));
            deal_slowly(0, begin);
            if (num_planes == step && step == 1)
                std::copy(in+begin, in+end, out+begin);
            else if (num_planes == step && step == 2)
                deal<2>(out+begin, plane, in + begin*2, end-begin);
            else if (num_planes == step && step == 4)
                deal<4>(out+begin, plane, in + begin*4, end-begin);
            else if (num_planes == step && step == 8)
                deal<8>(out+begin, plane, in + begin*8, end-begin);
            else
                deal_slowly(begin, end);
            deal_slowly(end, n);
        }

    // ----------------------------------------------------------------------------------------

        class convolution
        /*!
            WHAT THIS OBJECT REPRESENTS
                One convolution of data with filters.  What it computes at once is a position: a tile of
                4x4 pixels of output by Winograd's method, else a pixel.  From a position to the next, rows
                and columns of the input step on by step_y and step_x, so they are dealt out to so many
                planes: pixels of neighbouring positions then are neighbours, too.  With a stride, what a
                filter sees is like a filter on as many channels more, of every second row and column, say.

                Positions are counted row by row, those between the end of a row and the begin of the next
                included: they are computed for simplicity, and dropped.
        !*/
        {
        public:
            convolution (
                const planes& output_,
                const planes& data_,
                const tensor& filters_,
                const long stride_y,
                const long stride_x,
                const long padding_y_,
                const long padding_x_,
                const bool filters_are_final
            ) : output(output_), data(data_), filters(filters_), padding_y(padding_y_), padding_x(padding_x_)
            {
                const long filter_nr = filters.nr();
                const long filter_nc = filters.nc();
                phases_y = std::min(stride_y, filter_nr);
                phases_x = std::min(stride_x, filter_nc);
                const long reach = std::max((filter_nr + stride_y-1)/stride_y, (filter_nc + stride_x-1)/stride_x);
                if (filters_are_final && stride_y == stride_x && data.k >= 8 && output.nr*output.nc >= 200)
                    side = reach == 3 ? 6 : reach == 4 || reach == 5 ? 8 : 0;

                size = side ? tile : 1;
                step_y = size*stride_y;
                step_x = size*stride_x;
                planes_y = side ? step_y : phases_y;
                planes_x = side ? step_x : phases_x;
                beyond_y = side ? (side-1)/tile : (filter_nr-1)/stride_y;
                beyond_x = side ? (side-1)/tile : (filter_nc-1)/stride_x;

                // A strip's planes fit into the processor's cache.  A wide image is cut into columns.
                const long cached = 512*1024/sizeof(float)/(data.k*planes_y*planes_x);
                const long most_nc = std::max(16L, std::lround(8*std::sqrt(cached)));
                const long positions_nc = (output.nc + size-1)/size;
                num_columns = (positions_nc + most_nc-1)/most_nc;
                column_nc = (positions_nc + num_columns-1)/num_columns;
                nc = column_nc + beyond_x;
                num_positions = (output.nr + size-1)/size*nc - beyond_x;
                strip_size = std::max(1L, (cached - (beyond_y+1)*nc)/block_size)*block_size;
                num_strips = (num_positions + strip_size-1)/strip_size;
                plane = ((strip_size-1)/nc + 2 + beyond_y)*nc;

                for (long y = 0; y < side; ++y)
                    for (long x = 0; x < side; ++x)
                        square.push_back((y%tile*stride_y*planes_x + x%tile*stride_x)*plane + y/tile*nc + x/tile);
                if (side)
                    for (long i = 0; i < data.k*phases_y*phases_x; ++i)
                        offsets.push_back(i*block_size);
                else
                    for (long k = 0; k < data.k; ++k)
                        for (long y = 0; y < filter_nr; ++y)
                            for (long x = 0; x < filter_nc; ++x)
                                offsets.push_back(((k*planes_y + y%stride_y)*planes_x + x%stride_x)*plane
                                    + y/stride_y*nc + x/stride_x);
                depth = offsets.size();
            }

            bool is_winograd () const { return side != 0; }

            std::vector<float> transformed_filters () const
            /*!
                requires
                    - is_winograd()
                ensures
                    - Returns the filters' values: those of all filters at the first point, then at the next...
            !*/
            {
                const long reach = side-3;
                const long stride = step_y/tile;
                const long num = filters.num_samples()*depth;
                const std::vector<double> m = filter_at_points(side);
                std::vector<float> values(side*side*num);
                std::vector<double> rows(reach*side);
                for (long i = 0; i < num; ++i)
                {
                    const float* const f = filters.host() + i/(phases_y*phases_x)*filters.nr()*filters.nc();
                    const long y0 = i/phases_x%phases_y, x0 = i%phases_x;
                    for (long y = 0; y < reach; ++y)
                        for (long p = 0; p < side; ++p)
                        {
                            double& sum = rows[y*side + p] = 0;
                            if (y0 + y*stride < filters.nr())
                                for (long x = x0; x < filters.nc(); x += stride)
                                    sum += m[p*reach + x/stride]*f[(y0 + y*stride)*filters.nc() + x];
                        }
                    for (long q = 0; q < side; ++q)
                        for (long p = 0; p < side; ++p)
                        {
                            double sum = 0;
                            for (long y = 0; y < reach; ++y)
                                sum += m[q*reach + y]*rows[y*side + p];
                            values[(q*side + p)*num + i] = sum;
                        }
                }
                return values;
            }

            void run (
                const float* const weights,
                const bool add_to_output,
                const float* const biases,
                const bool use_relu,
                const bool use_threads
            ) const
            /*!
                requires
                    - weights points to the filters, or to transformed_filters() if is_winograd()
                    - biases is null or points to one for each filter
            !*/
            {
                // Where there are fewer strips than threads, each thread takes a part of the filters.
                const long num_tasks = data.num_samples*num_columns*num_strips;
                const long num_filters = filters.num_samples();
                const long num_groups = (num_filters + most_filters-1)/most_filters;
                const long num_threads = use_threads ? default_thread_pool().num_threads_in_pool() : 1;
                const long num_parts = std::max(1L, std::min(num_groups, num_threads/num_tasks));
                const long num_points = side ? side*side : 1;
                // From one point's values to the next's.  A multiple of 4096 bytes, as with 128 channels, would have
                // all points share a few sets of the first cache: so a line is left free in between.
                const long cache_line = 64/sizeof(float);
                const long point_step = depth*block_size + cache_line;
                const long sum_step = num_filters*block_size + cache_line;
                const auto run_tasks = [&](const long first, const long last)
                {
                    // Not vectors, as zeroing these takes a tenth of the time of a small layer.
                    const std::unique_ptr<float[]> pixels(new float[data.k*planes_y*planes_x*plane + block_size]);
                    const std::unique_ptr<float[]> at_points(new float[side ? num_points*point_step : 0]);
                    const std::unique_ptr<float[]> sums(new float[num_points*sum_step]);
                    const std::unique_ptr<float[]> tiles(new float[side ? tile*tile*block_size : 0]);
                    strip s;
                    for (long t = first; t < last; ++t)
                    {
                        const long part = t/num_tasks;
                        const long first_group = part*num_groups/num_parts, end_group = (part+1)*num_groups/num_parts;
                        s.n = t%num_tasks/num_strips/num_columns;
                        s.column = t/num_strips%num_columns*column_nc;
                        s.begin = t%num_strips*strip_size;
                        s.end = std::min(s.begin + strip_size, num_positions);
                        lay_out(pixels.get(), s, t != first && s.begin != 0);

                        for (long b = s.begin; b < s.end; b += block_size)
                        {
                            const long count = std::min(block_size, s.end-b);
                            const float* in = &pixels[b - s.begin/nc*nc];
                            if (side)
                            {
                                const auto transform = side == 6 ? squares_to_points<6> : squares_to_points<8>;
                                for (long i = 0; i < depth; ++i)
                                {
                                    const long k = i/(phases_y*phases_x), y = i/phases_x%phases_y, x = i%phases_x;
                                    transform(&at_points[i*block_size], point_step,
                                        in + ((k*planes_y + y)*planes_x + x)*plane, square.data());
                                }
                                in = at_points.get();
                            }
                            // Point by point, so that the pixels at it stay in the first cache for all filters.
                            for (long i = 0; i < num_points; ++i)
                                for (long g = first_group; g < end_group; ++g)
                                {
                                    const long f0 = g*num_filters/num_groups;
                                    const long f1 = (g+1)*num_filters/num_groups;
                                    multiply_for(f1-f0, count)(&sums[i*sum_step + f0*block_size], in + i*point_step,
                                        offsets, weights + (i*num_filters + f0)*depth);
                                }
                            for (long f = first_group*num_filters/num_groups; f < end_group*num_filters/num_groups; ++f)
                            {
                                const float* sum = &sums[f*block_size];
                                if (side)
                                {
                                    (side == 6 ? points_to_tiles<6> : points_to_tiles<8>)(tiles.get(), sum, sum_step);
                                    sum = tiles.get();
                                }
                                store(output.row(s.n, f, 0), sum, s.column, b, b+count,
                                    add_to_output, biases ? biases[f] : 0,
                                    use_relu ? 0 : -std::numeric_limits<float>::infinity());
                            }
                        }
                    }
                };
                if (!use_threads || num_parts*num_tasks == 1)
                    run_tasks(0, num_parts*num_tasks);
                else
                    parallel_for_blocked(0, num_parts*num_tasks, run_tasks);
            }

        private:
            struct strip
            {
                long n, column;   // of which sample, and from which of its positions in a row
                long begin, end;  // positions
                long first_row = 0, end_row = 0;  // of the planes
            };

            void lay_out (
                float* const pixels,
                strip& s,
                const bool goes_on
            ) const
            /*!
                ensures
                    - Deals out the rows that the strip needs.  If it goes on where that of s.first_row and
                      s.end_row ended, the rows that both need are moved rather than read again.
            !*/
            {
                const long first_row = s.begin/nc;
                const long end_row = (s.end-1)/nc + 1 + beyond_y;
                const long kept = goes_on ? std::max(0L, s.end_row - first_row) : 0;
                const long left = padding_x - s.column*step_x;
                const long right = left + data.nc;
                for (long k = 0; k < data.k; ++k)
                    for (long y = 0; y < planes_y; ++y)
                    {
                        float* const p = &pixels[(k*planes_y + y)*planes_x*plane];
                        for (long x = 0; kept > 0 && x < planes_x; ++x)
                            std::copy_n(p + x*plane + (first_row-s.first_row)*nc, kept*nc, p + x*plane);
                        for (long row = first_row+kept; row < end_row; ++row)
                        {
                            const long r = row*step_y + y - padding_y;
                            const bool inside = 0 <= r && r < data.nr;
                            deal(p + (row-first_row)*nc, plane, planes_x,
                                data.row(s.n, k, inside ? r : 0) - left, nc, step_x,
                                std::max(left, 0L), inside ? std::max(right, 0L) : 0);
                        }
                    }
                s.first_row = first_row;
                s.end_row = end_row;
            }

            void store (
                float* const out,
                const float* const sums,
                const long column,
                const long begin,
                const long end,
                const bool add_to_output,
                const float bias,
                const float least
            ) const
            /*!
                ensures
                    - Writes the positions [begin,end) to where they belong in out, an image of the output.
            !*/
            {
                for (long i = begin; i < end; i = (i/nc + 1)*nc)
                {
                    const long c = (column + i%nc)*size;
                    const long rest = output.nc - c;
                    const long length = std::min(std::min(end-i, column_nc - i%nc)*size, rest);
                    for (long y = 0; y < size && i/nc*size+y < output.nr; ++y)
                    {
                        float* const o = out + (i/nc*size+y)*output.row_step + c;
                        const float* const s = sums + (y*block_size + i-begin)*size;
                        if (add_to_output)
                            for (long j = 0; j < length; ++j)
                                o[j] = std::max(o[j] + s[j] + bias, least);
                        else
                            for (long j = 0; j < length; ++j)
                                o[j] = std::max(s[j] + bias, least);
                    }
                }
            }

            const planes output;
            const planes data;
            const tensor& filters;
            const long padding_y, padding_x;
            long phases_y, phases_x;    // how many filters a strided one is like, along each side
            long side = 0;              // of Winograd's squares; 0 without
            long size;                  // of a position, in pixels of output
            long step_y, step_x;        // from a position to the next, in pixels of input
            long planes_y, planes_x;    // how many planes a channel is dealt out to
            long beyond_y, beyond_x;    // how many positions' rows and columns are needed beyond the last
            long num_columns, column_nc;
            long nc;                    // of a plane
            long num_positions, strip_size, num_strips;
            long plane;                 // the size of one
            long depth;                 // how many products are summed up
            std::vector<long> offsets;  // where these find their pixels, seen from the position's first
            std::vector<long> square;   // where the pixels of a square are, seen from its first
        };

        }

    // ----------------------------------------------------------------------------------------

        void tensor_conv::convolve (
            const bool add_to_output,
            const planes& output,
            const planes& data,
            const tensor& filters,
            const float* const biases,
            const bool use_relu,
            const bool use_threads
        )
        {
            const convolution conv(output, data, filters, last_stride_y, last_stride_x,
                last_padding_y, last_padding_x, filters_are_final);
            if (conv.is_winograd())
                std::call_once(filters_transformed, [&]() { transformed_filters = conv.transformed_filters(); });
            conv.run(conv.is_winograd() ? transformed_filters.data() : filters.host(), add_to_output, biases, use_relu, use_threads);
        }

    // ----------------------------------------------------------------------------------------

    }
}

#ifndef __clang__
#pragma GCC pop_options
#endif

#endif // DLIB_DNN_CPU_CONV_cPP_
