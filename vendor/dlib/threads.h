#pragma once

#include <functional>

// The threads of dlib's default thread pool: as many as the environment variable DLIB_NUM_THREADS says, else one for
// each core.
long num_threads();

// Calls task(i) on these threads for each i from 0 to num-1, and waits for all.  They begin in this order.  If one
// throws, those that have not begun are left out, and the first exception is thrown to the caller.  (dlib's own
// parallel_for() hands an exception to whoever waits for the pool next, while other tasks still run.)
// Several threads may call it at a time.
void for_each_task(long num, const std::function<void(long)>& task);
