"""The two ways in which emulation fails."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """A kernel did something wrong while it ran: the message names kernel, line, thread, block and address."""


class EmulatorCompileError(EmulatorError):
    """A kernel could not be compiled, or there is nothing to compile it with."""
