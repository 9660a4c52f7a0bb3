"""Buffers of one rank, and when each exists.

Moments, in order. load: the models are read. Rollout: `decode`, the student writes; `score`, the teacher reads a chunk; `collect`, the
signal is laid end to end. Learning, of the largest micro-batch: `loss`, `backward`, `reduce` (gradients are reduced), `optimizer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

ROLLOUT = ("decode", "score", "collect")
LEARN = ("loss", "backward", "reduce", "optimizer")
ALWAYS = ("load", *ROLLOUT, *LEARN)
STEP = (*ROLLOUT, *LEARN)
PLACES = ("device", "cpu", "nvme")


@dataclass(frozen=True)
class Item:
    """`how`: the formula in words. `moments`: when it exists. `place`: "device", "cpu" or "nvme". `once`: on the first rank alone."""

    name: str
    how: str
    bytes: int
    moments: tuple[str, ...]
    place: str = "device"
    once: bool = False


@dataclass
class Memory:
    """The items of one rank. On a CPU host and device are one."""

    device: str
    items: list[Item] = field(default_factory=list)

    def add(
        self, name: str, how: str, size: float, moments: Iterable[str], place: str = "device", once: bool = False
    ) -> None:
        if size > 0:
            place = "device" if place == "cpu" and self.device == "cpu" else place
            self.items.append(Item(name, how, int(size), tuple(moments), place, once))

    def at(self, moment: str, place: str = "device", ranks: int = 1) -> int:
        """Of so many ranks, the first among them."""
        here = (item for item in self.items if moment in item.moments and item.place == place)
        return sum(item.bytes * (1 if item.once else ranks) for item in here)

    def peak(self, moments: Iterable[str], place: str = "device", ranks: int = 1) -> tuple[int, str]:
        """Bytes and the moment."""
        return max((self.at(moment, place, ranks), moment) for moment in moments)

    def largest(self, moment: str, place: str = "device", count: int = 3) -> list[Item]:
        here = [item for item in self.items if moment in item.moments and item.place == place]
        return sorted(here, key=lambda item: -item.bytes)[:count]


def number(value: float) -> str:
    """Three digits, with k, M or G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"
