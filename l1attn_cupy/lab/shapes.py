"""The shape of a call, as it is given on the command line."""

from __future__ import annotations

import re
from typing import NamedTuple


class Shape(NamedTuple):
    """Batch (heads included), lengths L and S, channels E."""

    batch: int
    length_q: int
    length_k: int
    channels: int

    @property
    def sizes(self) -> dict[str, int]:
        """As the registry takes them; values of attention are as wide as keys."""
        return {"q": self.length_q, "k": self.length_k, "e": self.channels, "v": self.channels}

    @property
    def pairs(self) -> int:
        """How many ``|q - k|`` the formula has."""
        return self.batch * self.length_q * self.length_k * self.channels

    def __str__(self) -> str:
        return "x".join(map(str, self))


#: What is timed, and looked up, unless another is asked for: 8 heads of 1,024 tokens, 64 wide.
USUAL = Shape(8, 1024, 1024, 64)


def parse(text: str) -> Shape:
    """``"8x1024x1024x64"``; a ValueError says what is required."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text):
        raise ValueError(f"a shape must be BxLxSxE, such as {USUAL}, got {text!r}")
    return Shape(*map(int, text.split("x")))
