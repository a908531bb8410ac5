// Uses no inline functions of other headers: see cpu.h.
#include "hog_kernels.h"
#include "lanes.h"

namespace
{
    const long cell = hog_cell_size, half_cell = cell / 2;
    const int num_orientations = 18;

    typedef several<2>::floats two_floats;

    // Where the memory of features() lies.  A histogram's bins are in pairs, a cell's and that of the cell below, as
    // each pixel adds to both.
    struct layout
    {
        explicit layout(const long columns)
            : num_cells((columns + half_cell) / cell), pixel_step(columns), cell_step(num_cells + 2) {}

        long pixels(const long row) const { return row % 3 * 3 * pixel_step; }
        long pairs() const { return 9 * pixel_step; }
        long cells(const long row) const { return pairs() + (2 + (row & 1)) * num_orientations * cell_step; }
        long energies(const long row) const { return pairs() + (4 * num_orientations + (row & 1)) * cell_step; }
        long limits(const long row) const { return energies(0) + (2 + (row & 1)) * cell_step; }
        long factors(const long row) const { return energies(0) + (4 + (row & 1)) * cell_step; }
        long size() const { return energies(0) + 6 * cell_step; }

        const long num_cells; // in a row
        const long pixel_step, cell_step;
    };

    long features_space(const long columns) { return layout(columns).size(); }

    // Of so many neighbouring pixels, the length of the gradient, the shares of the cells on the left and on the right
    // of it, and the place in the row's pairs of the left one's bin for its orientation.
    const long num_votes = 256;
    struct votes
    {
        float lengths[num_votes], to_left[num_votes], to_right[num_votes];
        int bins[num_votes];
    };

    // Of the three colours the one counts whose gradient is longest; of equal ones, the last if they are in a group.
    template <bool grouped>
    void find_votes(votes& __restrict v, const float* const above, const float* const row, const float* const below,
        const long step, const int begin, const int end)
    {
        // dlib takes the longest of a gradient's projections on 18 directions.  Tangents between the directions, from
        // dlib's rounded cosines and sines, give the same for each of the 511 x 511 gradients of bytes.
        const float tangents[] = {0.0603f / 0.3420f, 0.1737f / 0.3008f, 0.2660f / 0.2232f, 0.3264f / 0.1188f};
        for (int i = 0; i < end - begin; ++i)
        {
            const int x = begin + i;
            float dx = row[x + 1] - row[x - 1], dy = below[x] - above[x], squared = dx * dx + dy * dy;
            for (int k = 1; k < 3; ++k)
            {
                const float color_dx = row[k * step + x + 1] - row[k * step + x - 1];
                const float color_dy = below[k * step + x] - above[k * step + x];
                const float color_squared = color_dx * color_dx + color_dy * color_dy;
                const bool longer = grouped ? color_squared >= squared : color_squared > squared;
                dx = longer ? color_dx : dx;
                dy = longer ? color_dy : dy;
                squared = longer ? color_squared : squared;
            }

            const float width = __builtin_fabsf(dx), height = __builtin_fabsf(dy);
            const int steep = (height > width * tangents[0]) + (height > width * tangents[1])
                + (height > width * tangents[2]) + (height > width * tangents[3]);
            const float sign = steep == 0 ? dx : dy;
            const bool mirrored = (steep != 0) & (dx * dy < 0);
            const int orientation = (mirrored ? 9 - steep : steep) + (sign < 0 ? 9 : 0);
            v.bins[i] = 2 * (((x + (int)half_cell) >> 3) * num_orientations + orientation);

            const float right = (((x + (int)half_cell) & 7) + 0.5f) / cell, length = __builtin_sqrtf(squared);
            v.to_left[i] = grouped ? (1 - right) * length : 1 - right;
            v.to_right[i] = grouped ? right * length : right;
            if (!grouped)
                v.lengths[i] = length;
        }
    }

    // Adds them to the four bins around each of a row's pixels: bilinear interpolation.
    template <bool grouped>
    void vote(float* const pairs, const votes& v, const long y, const long num)
    {
        const float lower = ((y + half_cell) % cell + 0.5f) / cell;
        const two_floats down = {1 - lower, lower};
        for (long i = 0; i < num; ++i)
        {
            two_floats* const left = (two_floats*)(pairs + v.bins[i]);
            two_floats* const right = (two_floats*)(pairs + v.bins[i] + 2 * num_orientations);
            *left += grouped ? down * v.to_left[i] : down * v.to_left[i] * v.lengths[i];
            *right += grouped ? down * v.to_right[i] : down * v.to_right[i] * v.lengths[i];
        }
    }

    // Takes a row of cells out of the pairs, and makes place for the next.
    void take_cells(float* __restrict const cells, float* __restrict const pairs, const long step, const long num)
    {
        for (long c = 0; c < num; ++c)
            for (int o = 0; o < num_orientations; ++o)
            {
                float* const pair = pairs + 2 * ((c + 1) * num_orientations + o);
                cells[o * step + c] = pair[0];
                pair[0] = pair[1];
                pair[1] = 0;
            }
    }

    void find_energies(float* __restrict const energies, const float* const cells, const long step, const long num)
    {
        for (long c = 0; c < num; ++c)
        {
            float sum = 0;
            for (int o = 0; o < 9; ++o)
            {
                const float both = cells[o * step + c] + cells[(o + 9) * step + c];
                sum += both * both;
            }
            energies[c] = sum;
        }
    }

    // What the bins of a block of 2 x 2 cells are limited to, and multiplied with.
    void find_limits(float* __restrict const limits, float* __restrict const factors, const float* const above,
        const float* const below, const long num)
    {
        for (long c = 0; c < num; ++c)
        {
            limits[c] = 0.2f * __builtin_sqrtf(above[c] + above[c + 1] + below[c] + below[c + 1] + 0.0001f);
            factors[c] = 0.1f / limits[c];
        }
    }

    // A row of features from its cells' bins, each limited by the four blocks of which it is a part.
    void make_features(float* __restrict const out, const long plane_step, const float* const cells,
        const long cell_step, const float* const limits_above, const float* const factors_above,
        const float* const limits_below, const float* const factors_below, const long num)
    {
        #pragma GCC ivdep
        for (long x = 0; x < num; ++x)
        {
            const float limits[] = {limits_below[x + 1], limits_above[x + 1], limits_below[x], limits_above[x]};
            const float factors[] = {factors_below[x + 1], factors_above[x + 1], factors_below[x], factors_above[x]};
            const auto feature = [&](const float bin, float (&sums)[4])
            {
                float parts[4];
                for (int k = 0; k < 4; ++k)
                    sums[k] += parts[k] = (bin < limits[k] ? bin : limits[k]) * factors[k];
                return (parts[0] + parts[1]) + (parts[2] + parts[3]);
            };
            float textures[4] = {}, unused[4] = {};
            #pragma GCC unroll 6
            for (int o = 0; o < num_orientations; o += 3)
            {
                float three[4] = {};
                for (int i = o; i < o + 3; ++i)
                    out[i * plane_step + x] = feature(cells[i * cell_step + x], three);
                for (int k = 0; k < 4; ++k)
                    textures[k] += three[k];
            }
            #pragma GCC unroll 9
            for (int o = 0; o < 9; ++o)
                out[(o + num_orientations) * plane_step + x] =
                    feature(cells[o * cell_step + x] + cells[(o + 9) * cell_step + x], unused);
            for (int k = 0; k < 4; ++k)
                out[(27 + k) * plane_step + x] = textures[k] * (float)(2 * 0.2357);
        }
    }

    void features(const planes<float>& out, const planes<unsigned char>& image, const long begin, const long end,
        float* const space)
    {
        const long rows = image.rows, columns = image.columns;
        const layout in(columns);
        float* const pairs = space + in.pairs();
        for (long i = 0; i < 2 * num_orientations * in.cell_step; ++i)
            pairs[i] = 0;

        // The pixels that count, within the image's border and its last cell, and those that dlib takes in groups.
        const long last_row = min(rows, (rows + half_cell) / cell * cell) - 1;
        const long last_column = min(columns, in.num_cells * cell) - 1;
        const long last_grouped = 1 + (last_column - 1) / hog_group_size * hog_group_size;
        const auto load_pixels = [&](const long y)
        {
            float* const to = space + in.pixels(y);
            for (long k = 0; k < 3; ++k)
            {
                const unsigned char* const from = image.row(k, y);
                for (long x = 0; x < columns; ++x)
                    to[k * columns + x] = from[x];
            }
        };

        // Pixels lie between the centres of a row of cells and the next one.
        const long first_pixels = max(1, (begin - 1) * cell + half_cell);
        load_pixels(first_pixels - 1);
        load_pixels(first_pixels);
        for (long row = begin - 1; row < end + 2; ++row)
        {
            const long last_pixels = min(last_row, (row + 1) * cell + half_cell);
            for (long y = max(1, row * cell + half_cell); y < last_pixels; ++y)
            {
                load_pixels(y + 1);
                const float *const above = space + in.pixels(y - 1), *const middle = space + in.pixels(y);
                const float* const below = space + in.pixels(y + 1);
                votes v;
                for (long x = 1; x < last_grouped; x += num_votes)
                {
                    const long stop = min(x + num_votes, last_grouped);
                    find_votes<true>(v, above, middle, below, columns, x, stop);
                    vote<true>(pairs, v, y, stop - x);
                }
                find_votes<false>(v, above, middle, below, columns, last_grouped, last_column);
                vote<false>(pairs, v, y, last_column - last_grouped);
            }
            take_cells(space + in.cells(row), pairs, in.cell_step, in.num_cells);
            find_energies(space + in.energies(row), space + in.cells(row), in.cell_step, in.num_cells);
            if (row > begin)
                find_limits(space + in.limits(row), space + in.factors(row), space + in.energies(row - 1),
                    space + in.energies(row), in.num_cells - 1);
            if (row > begin + 1)
                make_features(out.row(0, row - 2), out.plane_step, space + in.cells(row - 1) + 1, in.cell_step,
                    space + in.limits(row - 1), space + in.factors(row - 1), space + in.limits(row),
                    space + in.factors(row), in.num_cells - 2);
        }
    }

    // The sum of products of a filter and values that lie a step from each other: of the first, and each every-th after.
    template <int num, int every>
    typename several<num>::floats product(const float* const in, const long step,
        const typename several<num>::floats* const filter, const int first)
    {
        typedef typename several<num>::floats floats;
        floats sum = *(const floats*)(in + first * step) * filter[first];
        for (int j = first + every; j < hog_filter_size; j += every)
            sum += *(const floats*)(in + j * step) * filter[j];
        return sum;
    }

    // Slides a filter over columns [begin,end) of some rows, so many rows at a time: two have values in common.
    template <int num, bool grouped, int num_rows, bool add>
    void slide(float* const out, const long out_step, const float* const in, const long in_step, const long step,
        const float* const filter, const long rows, const long begin, const long end)
    {
        typedef typename several<num>::floats floats;
        floats values[hog_filter_size];
        for (int j = 0; j < hog_filter_size; ++j)
            values[j] = floats{} + filter[j];
        for (long r = 0; r < rows; r += num_rows)
            for (long c = begin; c < end; c += num)
            {
                for (long i = r; i < r + num_rows; ++i)
                {
                    const float* const from = in + i * in_step + c;
                    const floats sum = grouped ? product<num, 3>(from, step, values, 0)
                        + (product<num, 3>(from, step, values, 1) + product<num, 3>(from, step, values, 2))
                        : product<num, 1>(from, step, values, 0);
                    floats& to = *(floats*)(out + i * out_step + c);
                    to = add ? sum + to : sum;
                }
            }
    }

    template <int num_rows, bool add>
    void slide_over(float* const out, const long out_step, const float* const in, const long in_step, const long step,
        const float* const filter, const long rows, const long columns)
    {
        const int group = hog_group_size, fewer = lanes < group ? lanes : group;
        const long grouped = columns / group * group, in_lanes = grouped / lanes * lanes;
        slide<lanes, true, num_rows, add>(out, out_step, in, in_step, step, filter, rows, 0, in_lanes);
        slide<fewer, true, num_rows, add>(out, out_step, in, in_step, step, filter, rows, in_lanes, grouped);
        if (grouped < columns)
            slide<fewer, false, num_rows, add>(out, out_step, in, in_step, step, filter, rows, grouped,
                grouped + group);
    }

    void filter(float* const scores, const long step, const float* const in, const long in_step, const long rows,
        const long columns, const float* const row_filter, const float* const column_filter, float* const space)
    {
        const long even = rows / 2 * 2;
        slide_over<1, false>(space, step, in, in_step, 1, row_filter, rows + hog_filter_size - 1, columns);
        slide_over<2, true>(scores, step, space, step, step, column_filter, even, columns);
        slide_over<1, true>(scores + even * step, step, space + even * step, step, step, column_filter, rows - even,
            columns);
    }
}

namespace LEVEL
{
    extern const hog_kernels hog = {features, features_space, filter};
}
