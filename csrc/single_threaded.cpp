// SPDX-License-Identifier: Apache-2.0
// With glibc 2.32 and later, libstdc++'s shared_ptr asks this variable whether it can do without
// atomic operations, and libraries that were built so load on no older glibc. Our own says that it
// cannot, as ever in a process that runs PyTorch; wheels then run from glibc 2.28 on.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
