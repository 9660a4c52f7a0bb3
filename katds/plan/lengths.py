"""How long prompts and rollouts are taken to be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from katds.config import Recipe
from katds.rollout.requests import in_audit


@dataclass(frozen=True)
class Prompts:
    """Tokens of the prompts: the longest, and their mean. `source` is for the reader of the plan."""

    longest: int
    mean: float
    source: str
    reading: float = 1.0  # tokens of an aligned teacher per token of the student


@dataclass(frozen=True)
class Lengths:
    """Response tokens, written and kept, of rollouts to draw from; `source` is for the reader of the plan.

    Args:
        audit: what rollouts of the audit group write, which no rule ends; empty: the group writes what the others do.
    """

    written: Sequence[int]
    kept: Sequence[int]
    source: str
    audit: Sequence[int] = ()

    def stretched(self, factor: float, longest: int) -> Lengths:
        """Each so many times as long, from 1 to `longest` tokens."""
        written, kept, audit = (
            [min(longest, max(1, round(factor * length))) if length else 0 for length in lengths]
            for lengths in (self.written, self.kept, self.audit)
        )
        return Lengths(written, kept, f"{self.source}, {factor:g} times as long, at most {longest}", audit)

    def draw(self, count: int, seed: int, audit_fraction: float = 0.0) -> tuple[list[int], list[int]]:
        """Of `count` rollouts, with replacement, the audit group first, as the engine begins them; equal seeds give equal lengths."""
        generator = random.Random(seed)
        chosen = generator.choices(range(len(self.written)), k=count)
        written, kept = [self.written[i] for i in chosen], [self.kept[i] for i in chosen]
        if not self.audit:
            return written, kept
        group = sum(in_audit(i, audit_fraction) for i in range(count))
        return generator.choices(self.audit, k=group) + written[group:], kept


WHOLE = "none recorded: every response is taken to be as long as it may be"


def longest(recipe: Recipe) -> Lengths:
    """Where no run has been recorded."""
    return Lengths([recipe.rollout.max_new_tokens], [recipe.rollout.max_new_tokens], WHOLE)
