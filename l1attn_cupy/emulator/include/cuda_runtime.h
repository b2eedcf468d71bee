// cuda_runtime.h: cuda_shim.hpp, which every kernel includes, already holds what kernels use of it.
