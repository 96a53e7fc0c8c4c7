// SPDX-License-Identifier: Apache-2.0
// Headers of PyTorch 2.14 look symbols up by name. Where glibc is 2.34 or later they get its new
// dlsym, and a library that was built so loads on no older glibc; it has the old one, too.
#include <cstdlib>  // says whether this is glibc

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#if defined(__x86_64__)
#define KVC_OLD "GLIBC_2.2.5"
#else
#define KVC_OLD "GLIBC_2.17"
#endif
__asm__(".symver kvc_old_dlsym, dlsym@" KVC_OLD);
extern "C" void* kvc_old_dlsym(void* handle, const char* name);
extern "C" __attribute__((visibility("hidden"))) void* dlsym(void* handle, const char* name) {
  return kvc_old_dlsym(handle, name);
}
#endif
