"""The structs of runtime/abi.hpp, for ctypes. Change both together."""

from __future__ import annotations

import ctypes
import enum
import functools
from ctypes import POINTER, Structure, c_char, c_int, c_uint, c_uint64, c_void_p
from pathlib import Path

DYNAMIC_SHARED_CAPACITY = 232448  # EMU_DYNAMIC_SHARED_CAPACITY
STATIC_SHARED_CAPACITY = 49152


class ErrorKind(enum.IntEnum):
    """What went wrong."""

    OK = 0
    OUT_OF_BOUNDS = 1
    READ_ONLY = 2
    MISALIGNED = 3
    UNINITIALISED = 4
    RACE = 5
    DIVERGENT = 6
    STOPPED = 7
    UNDEFINED = 8
    FAULT = 9


class RegionRecord(Structure):
    """EmuRegion."""

    _fields_ = [("begin", c_uint64), ("bytes", c_uint64), ("writable", c_int)]


class ErrorRecord(Structure):
    """EmuError."""

    _fields_ = [
        ("kind", c_int),
        ("is_write", c_int),
        ("thread", c_uint),
        ("block", c_uint),
        ("other_thread", c_uint),
        ("other_block", c_uint),
        ("size", c_uint),
        ("other_is_write", c_int),
        ("is_shared", c_int),
        ("reserved", c_int),
        ("address", c_uint64),
        ("pc", c_uint64),
        ("other_pc", c_uint64),
        ("text", c_char * 512),
    ]


class StatsRecord(Structure):
    """EmuStats."""

    _fields_ = [("barriers", c_uint64), ("loads", c_uint64), ("stores", c_uint64)]


class ModuleRecord(Structure):
    """EmuModule."""

    _fields_ = [
        ("entry", c_void_p),
        ("args_bytes", c_uint64),
        ("shared_anchor", c_void_p),
        ("dynamic_shared", c_void_p),
    ]


class LaunchRecord(Structure):
    """EmuLaunch."""

    _fields_ = [
        ("module", POINTER(ModuleRecord)),
        ("args", c_void_p),
        ("regions", POINTER(RegionRecord)),
        ("guards", POINTER(c_uint)),
        ("region_count", c_uint),
        ("guard_count", c_uint),
        ("grid", c_uint),
        ("block", c_uint),
        ("shared_bytes", c_uint),
        ("workers", c_uint),
        ("checked", c_int),
        ("seed", c_uint64),
    ]


@functools.lru_cache(maxsize=8)
def load_engine(path: Path) -> ctypes.CDLL:
    """The engine, with its four functions declared."""
    engine = ctypes.CDLL(str(path))
    engine.emu_start.argtypes = [POINTER(LaunchRecord)]
    engine.emu_start.restype = c_void_p
    engine.emu_wait.argtypes = [c_void_p, c_int]
    engine.emu_wait.restype = c_int
    engine.emu_cancel.argtypes = [c_void_p]
    engine.emu_cancel.restype = None
    engine.emu_finish.argtypes = [c_void_p, POINTER(StatsRecord), POINTER(ErrorRecord)]
    engine.emu_finish.restype = None
    return engine
