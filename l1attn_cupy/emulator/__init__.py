"""CUDA kernels on the CPU: compiled by the host C++ compiler, executed thread by thread, and checked."""
