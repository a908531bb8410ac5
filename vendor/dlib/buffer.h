#ifndef BUFFER_H
#define BUFFER_H

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

    // At least so many values.  What it had before is gone if they are more than ever; if it throws, in any case.
    T* get(const size_t needed)
    {
        if (needed > size)
        {
            memory.reset();
            size = 0;
            const size_t bytes = needed * sizeof(T) + alignment;
            memory.reset(new char[bytes]);
            size = needed;
            first = (T*)(((size_t)memory.get() + alignment - 1) / alignment * alignment);
            use_large_pages(bytes);
        }
        return first;
    }

private:
    // To get memory from the system takes a tenth of HOG's time if its pages are of 4 KB, and little if they are of 2 MB.
    void use_large_pages(const size_t bytes)
    {
        const size_t page = 2 << 20;
        const size_t begin = ((size_t)memory.get() + page - 1) / page * page, end = ((size_t)memory.get() + bytes) / page * page;
        if (begin < end)
            madvise((void*)begin, end - begin, MADV_HUGEPAGE);
    }

    std::unique_ptr<char[]> memory;
    T* first = nullptr;
    size_t size = 0; // values
};

#endif
