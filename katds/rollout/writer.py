"""The teacher as a writer: the rollout engine, with the teacher in the student's place.

So it writes with continuous batching, by the fastest decode steps that its family has, and with counter-based random numbers; prompts are
dealt over the ranks, each of which holds the teacher whole while it writes (`teacher.gather` phase or once).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch

from katds.core.collective import Collective
from katds.core.counter import key
from katds.core.stop.simple import NeverRule
from katds.core.types import Need, Prompt, RolloutRequest
from katds.models.causal import FlatCausalLM
from katds.rollout.engine import PhaseClock, RolloutEngine
from katds.rollout.sizes import EngineSettings

# Random numbers of their own: with the student's, the teacher would draw the same quantiles from its distribution as the student from its.
_PEN = 0x50454E


class WritingTeacher(Protocol):
    """See `katds.parallel.zero.ZeroFrozen`."""

    def decoding(self) -> AbstractContextManager[FlatCausalLM]: ...
    def embedding_weight(self) -> AbstractContextManager[torch.Tensor]: ...
    def head_weight(self) -> AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]: ...


def teacher_engine(
    teacher: WritingTeacher,
    scored: bool,
    collective: Collective,
    settings: EngineSettings,
    clock: PhaseClock,
    say: Callable[[str], None] = lambda _: None,
) -> RolloutEngine:
    """An engine in which the teacher writes, to one of the end tokens `settings.eos_ids` or the request's length.

    `scored`: its batches have TEACHER_TOP and TEACHER_TOP_IDS of each token, `settings.top_k` wide, from the decode steps themselves.
    """
    needs = frozenset({Need.TEACHER_TOP_K}) if scored else frozenset[Need]()
    return RolloutEngine(teacher, (), NeverRule(), needs, collective, settings, clock, say)


@dataclass(frozen=True, slots=True)
class TeacherPen:
    """`katds.core.objectives.base.Pen` of one step.

    Args:
        engine: a `teacher_engine`.
    """

    engine: RolloutEngine
    teacher: WritingTeacher
    collective: Collective
    clock: PhaseClock  # told of the part "teacher writes"
    context: int  # tokens that it can attend to: prefix and continuation
    step: int

    def write(self, prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[list[int]]:
        """Collective: see `Pen.write`. Sampled as rollouts are: their temperature and filters. Equal prefixes, on whatever ranks, get the
        same continuation, which is written once, as long as the longest of them.

        Cost: two gathers of all ranks' token ids, prefixes before and continuations after, 4 bytes each, held by every rank; each distinct
        prefix is read once, whether or not it continues another.
        """
        assert all(map(len, prefixes)) and min(tokens, default=1) >= 1, f"{tokens} after {[len(p) for p in prefixes]}"
        asked = [(array("i", prefix).tobytes(), count) for prefix, count in zip(prefixes, tokens, strict=True)]
        longest: dict[bytes, int] = {}
        for prefix, count in chain.from_iterable(self.collective.gather(asked)):
            longest[prefix] = max(count, longest.get(prefix, 0))
        everyone = sorted(longest)
        requests = continuations(everyone, [longest[prefix] for prefix in everyone], self.context)
        with self.clock("teacher writes"):
            batch = self.engine.generate(requests, key(_PEN, self.step))
        own = {everyone[r.request.prompt.index]: array("i", r.response_ids).tobytes() for r in batch.rollouts}
        written: dict[bytes, bytes] = {}
        for part in self.collective.gather(own):
            written |= part
        return [_ids(written[prefix])[:count].tolist() for prefix, count in asked]

    def embed(self, ids: torch.Tensor, output: bool = False) -> torch.Tensor:
        """Collective unless the teacher is kept whole: see `Pen.embed`. The table is gathered for the call."""
        with self._table(output) as weight, torch.no_grad():
            rows = torch.nn.functional.embedding(ids.to(weight.device).long(), weight)
            return rows.float().to(ids.device)

    @contextmanager
    def _table(self, output: bool) -> Iterator[torch.Tensor]:
        if not output:
            with self.teacher.embedding_weight() as weight:
                yield weight
            return
        with self.teacher.head_weight() as (weight, _):
            yield weight


def continuations(prefixes: Sequence[bytes], tokens: Sequence[int], context: int) -> list[RolloutRequest]:
    """What continues each of these texts (int32 token ids), by so many tokens, as far as `context` has room. The requests read the texts
    where they are: a tuple of each would take ten times their memory on every rank."""
    requests = []
    for place, (prefix, count) in enumerate(zip(prefixes, tokens, strict=True)):
        ids = _ids(prefix)
        assert len(ids) < context, f"a text of {len(ids)} tokens fills a context of {context}"
        requests.append(RolloutRequest(_name(prefix), Prompt(place, ids), min(count, context - len(ids))))
    return requests


def _name(prefix: bytes) -> int:
    """What names the draws of a prefix: a hash of its ids. Two prefixes of one name, one pair in 2^64, would share random numbers."""
    return int.from_bytes(hashlib.blake2b(prefix, digest_size=8).digest(), "little")


def _ids(text: bytes) -> memoryview[int]:
    return memoryview(text).cast("i")
