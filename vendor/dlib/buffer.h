#pragma once

#include <cstddef>
#include <memory>
#include <sys/mman.h>

// Memory of no particular values, to be used again.
template <typename T>
class buffer
{
public:
    // It begins where a line of the processor's cache does, as rows that do so, too, are read in less time.
    static const size_t alignment = 64; // bytes

    // At least so many values.  Former ones are lost if it has to grow, or if it throws.
    T* get(const size_t needed)
    {
        if (needed > size)
        {
            memory.reset();
            size = 0;
            memory.reset(new char[needed * sizeof(T) + alignment]);
            size = needed;
            advise(0, MADV_HUGEPAGE);
        }
        return (T*)((size_t)(memory.get() + alignment - 1) / alignment * alignment);
    }

    // Gives back to the system what lies beyond so many bytes.  It is there again when it is used again.
    void keep(const size_t bytes) { advise(bytes, MADV_DONTNEED); }

private:
    // Advises the system on whole pages of 2 MB.  To get memory in pages of 4 KB takes a tenth of HOG's time, and a sixth
    // of the CNN's at 4 megapixels; in pages of 2 MB, little.
    void advise(const size_t beyond, const int advice)
    {
        const size_t page = 2 << 20, begin = (size_t)memory.get(), end = begin + size * sizeof(T) + alignment;
        const size_t first = (begin + beyond + page - 1) / page * page, last = end / page * page;
        if (first < last)
            madvise((void*)first, last - first, advice);
    }

    std::unique_ptr<char[]> memory;
    size_t size = 0; // values
};
