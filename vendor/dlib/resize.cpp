#include "resize.h"
#include "cpu.h"
#include <algorithm>
#include <memory>

namespace
{
    auto rows_of(unsigned char) { return cpu().resizing->bytes; }
    auto rows_of(float) { return cpu().resizing->floats; }
}

template <typename T>
resizing<T>::resizing(const planes<T>& to_, const planes<T>& from_) : to(to_), from(from_)
{
    // So many pixels are worth a thread's while.
    rows_per_task = std::max(1L, (1 << 15) / std::max(1L, to.columns));
    if (from.rows * from.columns > 0 && to.columns > 0)
        num = (to.rows + rows_per_task - 1) / rows_per_task;

    // As dlib finds the columns, four at a time, in single precision.  The sums in xs may fall behind, so that the
    // output's row ends before the input's.
    const double x_step = (from.columns - 1) / (double)std::max(to.columns - 1, 1L);
    float xs[4];
    for (int i = 0; i < 4; ++i)
        xs[i] = -4 * x_step + i * x_step;
    while ((long)lefts.size() + 4 <= to.columns)
    {
        for (float& x : xs)
            x += (float)(4 * x_step);
        if ((long)xs[3] + 1 >= from.columns)
            break;
        for (const float x : xs)
        {
            lefts.push_back((int)x);
            fractions.push_back(x - lefts.back());
        }
    }
    // Those that are left, and the rows, in double precision.
    double x = -x_step + lefts.size() * x_step, y = 0;
    for (long c = lefts.size(); c < to.columns; ++c)
        last_xs.push_back(x += x_step);
    for (long r = 0; r < to.rows; ++r, y += (from.rows - 1) / (double)std::max(to.rows - 1, 1L))
        ys.push_back(y);
}

template <typename T>
void resizing<T>::run(const long task) const
{
    const resize_map map = {ys.data(), (long)lefts.size(), lefts.data(), fractions.data(), last_xs.data()};
    const std::unique_ptr<T[]> space(new T[4 * lefts.size()]);
    const long begin = task * rows_per_task;
    rows_of(T())(to, from, map, begin, std::min(begin + rows_per_task, to.rows), space.get());
}

template class resizing<unsigned char>;
template class resizing<float>;
