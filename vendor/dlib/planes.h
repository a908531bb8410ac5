#pragma once

// An image in memory that somebody else owns: one plane after the other, each row by row; or a part of such an image.
template <typename T>
struct planes
{
    T* data;
    long num, rows, columns;
    long row_step, plane_step; // from one to the next

    planes(T* data_, const long num_, const long rows_, const long columns_) : data(data_), num(num_),
        rows(rows_), columns(columns_), row_step(columns_), plane_step(rows_ * columns_) {}

    planes part(const long r, const long c, const long part_rows, const long part_columns) const
    {
        planes p = *this;
        p.data = row(0, r) + c;
        p.rows = part_rows;
        p.columns = part_columns;
        return p;
    }

    // Kernels use it, too: it must be inlined there (cpu.h).
    __attribute__((always_inline)) T* row(const long plane, const long r) const
    {
        return data + plane * plane_step + r * row_step;
    }
};
