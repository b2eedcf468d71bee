#!/usr/bin/env python3
"""The kernel lab; see l1attn_cupy/lab."""

import sys

from l1attn_cupy.lab.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
