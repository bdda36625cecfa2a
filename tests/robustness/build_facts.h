// What setup.py writes for a real build.
#pragma once
#define SVF_FAST_TORCH "that of the tests"
#define SVF_FAST_CUDA_DECISION "no, sanitized for the tests"
#define SVF_FAST_CUDA_ARCH_LIST ""
#define SVF_FAST_CUDA_BUILT 0
