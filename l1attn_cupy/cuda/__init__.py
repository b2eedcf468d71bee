"""The CUDA backend: kernels in ``kernels_cu/``, compiled at run time by CuPy."""
