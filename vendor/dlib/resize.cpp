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
    // About as many pixels as are worth a thread's while, but not more than ....
    rows_per_task = std::max(1L, (1 << 15) / std::max(1L, to.columns));
    if (from.rows * from.columns > 0 && to.columns > 0)
        num = to.num * ((to.rows + rows_per_task - 1) / rows_per_task);

    // As dlib finds the columns, four at a time, in single precision.  The sums in xs may fall behind, so that the
    // output's row ends before the input's.
    const double x_scale = (from.columns - 1) / (double)std::max(to.columns - 1, 1L);
    float xs[4];
    for (int i = 0; i < 4; ++i)
        xs[i] = -4 * x_scale + i * x_scale;
    while ((long)lefts.size() + 4 <= to.columns)
    {
        for (float& x : xs)
            x += (float)(4 * x_scale);
        if ((long)xs[3] + 1 >= from.columns)
            break;
        for (const float x : xs)
        {
            lefts.push_back((int)x);
            fractions.push_back(x - lefts.back());
        }
    }
}

template <typename T>
void resizing<T>::run(const long task) const
{
    const long plane = task % to.num, begin = task / to.num * rows_per_task;
    const resize_shape shape = {from.rows, from.columns, to.rows, to.columns, (long)lefts.size(), lefts.data(),
        fractions.data()};
    const std::unique_ptr<T[]> space(new T[4 * lefts.size()]);
    rows_of(T())(to.row(plane, 0), to.row_step, from.row(plane, 0), from.row_step, shape, begin,
        std::min(begin + rows_per_task, to.rows), space.get());
}

template class resizing<unsigned char>;
template class resizing<float>;
