#include "threads.h"
#include <algorithm>
#include <atomic>
#include <dlib/threads.h>
#include <exception>
#include <mutex>

long num_threads()
{
    return std::max(1ul, dlib::default_thread_pool().num_threads_in_pool());
}

void for_each_task(const long num, const std::function<void(long)>& task)
{
    std::atomic<long> next(0);
    std::mutex mutex;
    std::exception_ptr first;
    const auto work = [&](long)
    {
        for (long i = next++; i < num; i = next++)
            try
            {
                task(i);
            }
            catch (...)
            {
                const std::lock_guard<std::mutex> lock(mutex);
                if (!first)
                    first = std::current_exception();
                next = num;
            }
    };
    const long threads = std::min(num, num_threads());
    if (threads > 1)
        dlib::parallel_for(0, threads, work, 1);
    else
        work(0);
    if (first)
        std::rethrow_exception(first);
}
