// What our module needs of dlib's own sources, but for the two large ones.
#include <dlib/base64/base64_kernel_1.cpp>
#include <dlib/entropy_decoder/entropy_decoder_kernel_2.cpp>
#include <dlib/test_for_odr_violations.cpp>
#include <dlib/threads/async.cpp>
#include <dlib/threads/thread_pool_extension.cpp>
#include <dlib/threads/threads_kernel_2.cpp>
#include <dlib/threads/threads_kernel_shared.cpp>
