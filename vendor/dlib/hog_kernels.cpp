// Includes nothing with inline functions: see cpu.h.
#include "hog_kernels.h"

namespace
{
    const long cell = hog_cell_size, half_cell = cell / 2;
    const int num_orientations = 18;

    typedef float two_floats __attribute__((vector_size(8), aligned(4), may_alias));

    long min(const long a, const long b) { return a < b ? a : b; }
    long max(const long a, const long b) { return a > b ? a : b; }

    // Where the memory of features() lies.  A histogram's bins are in pairs, a cell's and that of the cell below, as
    // each pixel adds to both.
    struct layout
    {
        explicit layout(const long columns)
            : num_cells((columns + half_cell) / cell), pixel_step(columns), cell_step(num_cells + 2) {}

        long pixels(const long row) const { return row % 3 * 3 * pixel_step; }
        long bins() const { return 9 * pixel_step; }
        long lengths() const { return 10 * pixel_step; }
        long to_left() const { return 11 * pixel_step; }
        long to_right() const { return 12 * pixel_step; }
        long pairs() const { return 13 * pixel_step; }
        long cells(const long row) const { return pairs() + (2 + (row & 1)) * num_orientations * cell_step; }
        long energies(const long row) const { return pairs() + (4 * num_orientations + (row & 1)) * cell_step; }
        long limits(const long row) const { return energies(0) + (2 + (row & 1)) * cell_step; }
        long scales(const long row) const { return energies(0) + (4 + (row & 1)) * cell_step; }
        long size() const { return energies(0) + 6 * cell_step; }

        const long num_cells; // in a row
        const long pixel_step, cell_step;
    };

    long features_space(const long columns) { return layout(columns).size(); }

    // For each pixel x of a row, finds the length of its gradient, shared out to the cells on its left and right, and
    // the place among the row's pairs of the left one's bin for its orientation.
    // Of the three colors the one counts whose gradient is longest; of equal ones, the last if they are in a group.
    template <bool grouped>
    void find_gradients(float* __restrict const to_left, float* __restrict const to_right, float* __restrict const lengths,
        int* __restrict const bins, const float* const above, const float* const row, const float* const below,
        const long step, const long begin, const long end)
    {
        // dlib takes the longest of 18 projections.  Seen from these, it is that between whose neighbors the gradient is:
        // for each pair of values that a gradient of bytes can have.
        const float tangents[] = {0.0603f / 0.3420f, 0.1737f / 0.3008f, 0.2660f / 0.2232f, 0.3264f / 0.1188f};
        #pragma GCC ivdep
        for (int x = begin; x < end; ++x)
        {
            float dx = row[x + 1] - row[x - 1], dy = below[x] - above[x], squared = dx * dx + dy * dy;
            #pragma GCC unroll 2
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
            const int orientation = ((steep != 0) & (dx * dy < 0) ? 9 - steep : steep) + (sign < 0 ? 9 : 0);
            bins[x] = 2 * (((x + (int)half_cell) >> 3) * num_orientations + orientation);

            const float right = (((x + (int)half_cell) & 7) + 0.5f) / cell, length = __builtin_sqrtf(squared);
            to_left[x] = grouped ? (1 - right) * length : 1 - right;
            to_right[x] = grouped ? right * length : right;
            if (!grouped)
                lengths[x] = length;
        }
    }

    // Adds the lengths to the four bins around each pixel by bilinear interpolation.
    template <bool grouped>
    void vote(float* const pairs, const float* const to_left, const float* const to_right, const float* const lengths,
        const int* const bins, const long y, const long begin, const long end)
    {
        const float lower = ((y + half_cell) % cell + 0.5f) / cell;
        const two_floats down = {1 - lower, lower};
        for (long x = begin; x < end; ++x)
        {
            two_floats* const left = (two_floats*)(pairs + bins[x]);
            two_floats* const right = (two_floats*)(pairs + bins[x] + 2 * num_orientations);
            *left += grouped ? down * to_left[x] : down * to_left[x] * lengths[x];
            *right += grouped ? down * to_right[x] : down * to_right[x] * lengths[x];
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
            #pragma GCC unroll 9
            for (int o = 0; o < 9; ++o)
            {
                const float both = cells[o * step + c] + cells[(o + 9) * step + c];
                sum += both * both;
            }
            energies[c] = sum;
        }
    }

    // What the bins of a block of 2 x 2 cells are limited to, and multiplied with.
    void find_limits(float* __restrict const limits, float* __restrict const scales, const float* const above,
        const float* const below, const long num)
    {
        for (long c = 0; c < num; ++c)
        {
            limits[c] = 0.2f * __builtin_sqrtf(above[c] + above[c + 1] + below[c] + below[c + 1] + 0.0001f);
            scales[c] = 0.1f / limits[c];
        }
    }

    // A row of features from its cells' bins, each limited by the four blocks of which it is a part.
    void make_features(float* __restrict const out, const long plane_step, const float* const cells, const long cell_step,
        const float* const limits_above, const float* const scales_above, const float* const limits_below,
        const float* const scales_below, const long num)
    {
        #pragma GCC ivdep
        for (long x = 0; x < num; ++x)
        {
            const float limits[] = {limits_below[x + 1], limits_above[x + 1], limits_below[x], limits_above[x]};
            const float scales[] = {scales_below[x + 1], scales_above[x + 1], scales_below[x], scales_above[x]};
            float textures[4] = {};
            #pragma GCC unroll 6
            for (int o = 0; o < num_orientations; o += 3)
            {
                float three[4] = {};
                #pragma GCC unroll 3
                for (int i = o; i < o + 3; ++i)
                {
                    const float bin = cells[i * cell_step + x];
                    float parts[4];
                    #pragma GCC unroll 4
                    for (int k = 0; k < 4; ++k)
                    {
                        parts[k] = (bin < limits[k] ? bin : limits[k]) * scales[k];
                        three[k] += parts[k];
                    }
                    out[i * plane_step + x] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
                }
                #pragma GCC unroll 4
                for (int k = 0; k < 4; ++k)
                    textures[k] += three[k];
            }
            #pragma GCC unroll 9
            for (int o = 0; o < 9; ++o)
            {
                const float bin = cells[o * cell_step + x] + cells[(o + 9) * cell_step + x];
                float parts[4];
                #pragma GCC unroll 4
                for (int k = 0; k < 4; ++k)
                    parts[k] = (bin < limits[k] ? bin : limits[k]) * scales[k];
                out[(o + num_orientations) * plane_step + x] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
            }
            #pragma GCC unroll 4
            for (int k = 0; k < 4; ++k)
                out[(27 + k) * plane_step + x] = textures[k] * (float)(2 * 0.2357);
        }
    }

    void features(float* const out, const long row_step, const long plane_step, const unsigned char* const image,
        const long rows, const long columns, const long begin, const long end, float* const space)
    {
        const layout in(columns);
        int* const bins = (int*)(space + in.bins());
        float *const lengths = space + in.lengths(), *const to_left = space + in.to_left(), *const to_right = space + in.to_right();
        float* const pairs = space + in.pairs();
        for (long i = 0; i < 2 * num_orientations * in.cell_step; ++i)
            pairs[i] = 0;

        // The pixels that count, within the image's border and its last whole cell, and those that dlib takes in groups.
        const long last_row = min(rows, (rows + half_cell) / cell * cell) - 1;
        const long last_column = min(columns, in.num_cells * cell) - 1;
        const long grouped = 1 + (last_column - 1) / hog_group_size * hog_group_size;
        const auto load_pixels = [&](const long y)
        {
            float* const to = space + in.pixels(y);
            for (long k = 0; k < 3; ++k)
                for (long x = 0; x < columns; ++x)
                    to[k * columns + x] = image[(k * rows + y) * columns + x];
        };

        // Pixels lie between the centers of a row of cells and the next one.
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
                find_gradients<true>(to_left, to_right, lengths, bins, above, middle, below, columns, 1, grouped);
                find_gradients<false>(to_left, to_right, lengths, bins, above, middle, below, columns, grouped, last_column);
                vote<true>(pairs, to_left, to_right, lengths, bins, y, 1, grouped);
                vote<false>(pairs, to_left, to_right, lengths, bins, y, grouped, last_column);
            }
            take_cells(space + in.cells(row), pairs, in.cell_step, in.num_cells);
            find_energies(space + in.energies(row), space + in.cells(row), in.cell_step, in.num_cells);
            if (row > begin)
                find_limits(space + in.limits(row), space + in.scales(row), space + in.energies(row - 1),
                    space + in.energies(row), in.num_cells - 1);
            if (row > begin + 1)
                make_features(out + (row - 2) * row_step, plane_step, space + in.cells(row - 1) + 1, in.cell_step,
                    space + in.limits(row - 1), space + in.scales(row - 1), space + in.limits(row),
                    space + in.scales(row), in.num_cells - 2);
        }
    }

    // Adds up every so-manieth product of a filter and values that lie a step from each other.
    template <int every>
    float product(const float* const in, const long step, const float* const filter, const int first)
    {
        float sum = in[first * step] * filter[first];
        #pragma GCC unroll 10
        for (int j = first + every; j < hog_filter_size; j += every)
            sum += in[j * step] * filter[j];
        return sum;
    }

    // Computes one row, or two at a time, which have values in common.
    template <bool grouped, int num_rows, bool add>
    void slide(float* __restrict const out, const long step, const float* const in, const long in_step,
        const float* const filter, const long num)
    {
        #pragma GCC ivdep
        for (long i = 0; i < num; ++i)
        {
            #pragma GCC unroll 2
            for (int r = 0; r < num_rows; ++r)
            {
                const float* const from = in + r * step + i;
                const float sum = grouped ? product<3>(from, in_step, filter, 0)
                    + (product<3>(from, in_step, filter, 1) + product<3>(from, in_step, filter, 2))
                    : product<1>(from, in_step, filter, 0);
                float& to = out[r * step + i];
                to = add ? sum + to : sum;
            }
        }
    }

    template <int num_rows, bool add>
    void slide_along(float* const out, const long step, const float* const in, const long in_step,
        const float* const filter, const long num)
    {
        const long grouped = num / hog_group_size * hog_group_size;
        slide<true, num_rows, add>(out, step, in, in_step, filter, grouped);
        if (grouped < num)
            slide<false, num_rows, add>(out + grouped, step, in + grouped, in_step, filter, hog_group_size);
    }

    void filter(float* const scores, const long score_step, const float* const in, const long in_step, const long rows,
        const long columns, const float* const row_filter, const float* const column_filter, float* const space)
    {
        const long step = score_step;
        for (long r = 0; r < rows + hog_filter_size - 1; ++r)
            slide_along<1, false>(space + r * step, step, in + r * in_step, 1, row_filter, columns);
        for (long r = 0; r + 1 < rows; r += 2)
            slide_along<2, true>(scores + r * step, step, space + r * step, step, column_filter, columns);
        if (rows % 2 != 0)
            slide_along<1, true>(scores + (rows - 1) * step, step, space + (rows - 1) * step, step, column_filter, columns);
    }
}

namespace LEVEL
{
    extern const hog_kernels hog = {features, features_space, filter};
}
