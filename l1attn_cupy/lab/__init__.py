"""The kernel lab: edit a ``.cu`` file, see at once whether it is right and how fast it is.

``python -m l1attn_cupy.lab --help`` tells its commands. Without a GPU they go by emulation and by machine code, and say
so. Needs ``pip install "l1attn_cupy[lab]"``; machine code also CuPy and NVIDIA's assembler, as in the extra ``test``.
"""
