"""The teacher reads along: one forward per chunk gives the stop signal and the training target.

The teacher has its own slot cache in step with the student's. The prompts of fresh seats ride in the same forward as
the chunks of the others. With a sharded teacher the forward is a collective, so every rank makes it in every round, with one
dummy token where it has nothing to score.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from katds.core.divergences import top_k_tail_reverse_kl
from katds.core.teacher_signal import score_tile
from katds.core.types import Field, Need
from katds.models.causal import Forward
from katds.models.plans import upload
from katds.models.slot_cache import SlotCache, ragged_plan
from katds.models.tiled_head import score_head
from katds.rollout import prefill
from katds.rollout.decode import Chunk
from katds.rollout.slots import Seat

OF_STUDENT = frozenset({Need.WRITTEN, Need.STUDENT_ENTROPY})


@dataclass(slots=True)
class Scores:
    """The teacher's word on a chunk, and what the student kept of it: rows of `signal` and divergences are slot after slot, C each, or
    `counts`."""

    signal: dict[Field, torch.Tensor]
    # float32 [nats] of every row, of any shape: top-K + tail reverse KL, or of chunks of text
    divergences: torch.Tensor | None
    tokens: int = 0  # that the forward read
    # Of each slot's tokens that are written and not judged, so many are judged now; None: the chunk.
    counts: list[int] | None = None
    full: frozenset[int] = frozenset()  # slots whose teacher can read no more: these tokens are their last


class Scorer(Protocol):
    """What the engine asks about each chunk that was written."""

    def score(self, seats: Sequence[Seat], leaders: Mapping[int, int], chunk: Chunk | None) -> Scores:
        """Collective; see `TeacherScorer.score`."""
        ...

    def move(self, source: int, target: int, seat: Seat) -> None:
        """`seat` has moved from slot to slot."""
        ...


@dataclass(frozen=True, slots=True)
class Compared:
    """Where the per-token divergence for the stop rule is computed: on the student's most probable tokens, which the chunk names, or, with
    the student's `head` (weight and bias), on the teacher's `top_k`.

    The teacher's are known only after the student has written. Its log-probabilities there are then those of its head on the chunk's hidden
    states: once more the head's product per token, and H numbers per token of the chunk, but never [tokens, V].
    """

    top_k: int
    head: tuple[torch.Tensor, torch.Tensor | None] | None = None


class TeacherScorer:
    """Scores chunks.

    Args:
        needs: what the objective asks for; exactly this is computed and kept.
        compared: also compare with the student, for the stop rule.
        teacher_top_k: K of Need.TEACHER_TOP_K.
        temperature: that of the rollout; student and teacher are compared at the same one.
        whole: the teacher's forward is no collective. Prompts too many for one forward are then read before the chunk; a sharded
            teacher, whose ranks must all make the same number of forwards, reads them with it, whatever memory that takes.
    """

    def __init__(
        self,
        teacher: Forward,
        cache: SlotCache,
        needs: frozenset[Need],
        compared: Compared | None,
        teacher_top_k: int,
        temperature: float,
        whole: bool = False,
    ) -> None:
        self._teacher = teacher
        self._cache = cache
        self._needs = needs
        self._compared, self._teacher_top_k, wanted = compared, teacher_top_k, set(needs)
        self._scored_top_k = teacher_top_k
        if compared is not None and compared.head is not None:
            wanted.add(Need.TEACHER_TOP_K)
            self._scored_top_k = max(compared.top_k, teacher_top_k if Need.TEACHER_TOP_K in needs else 0)
        elif compared is not None:
            wanted.add(Need.STUDENT_TOP_K)
        self._scored = wanted - {Need.FULL} - OF_STUDENT
        self._temperature = temperature
        self._whole = whole

    @torch.no_grad()
    def score(
        self, seats: Sequence[Seat], leaders: Mapping[int, int], chunk: Chunk | None, own: Sequence[bool] | None = None
    ) -> Scores:
        """Collective where the teacher is sharded. Scores `chunk`, which the first of `seats` have written, and reads the prompts
        of fresh seats; without anything to read feeds a dummy token. Of the seats that are not its `own` it reads nothing, and
        `Scores` has no rows for them."""
        judged, width = (0, 0) if chunk is None else chunk.inputs_SC.shape
        own = [True] * len(seats) if own is None else own
        first = len(seats) - sum(seat.fresh for seat in seats) + len(leaders)  # from here on prompts are read
        before = self._read_apart(seats, leaders, first, own) if self._whole else 0
        if before:
            first, leaders = len(seats), {}
        uniform = min(first, judged) if all(own) else 0
        starts = [0 if slot >= first else seat.position for slot, seat in enumerate(seats)]
        counts = [
            (seat.position - start + (width if slot < judged else 0)) * mine
            for slot, (seat, start, mine) in enumerate(zip(seats, starts, own, strict=True))
        ]
        if not any(counts):
            return Scores({}, None, before) if before else self._dummy()
        if not any(counts[uniform:]):
            starts, counts = starts[:uniform], counts[:uniform]
        copies = [
            (leader, slot, seats[slot].position)
            for slot, leader in leaders.items()
            if leader < len(counts) and own[slot]
        ]
        plan, positions = ragged_plan(self._cache, 0, starts, counts, uniform, copies)
        prompts = [
            seat.request.prompt.token_ids[:-1] if slot >= first and own[slot] else () for slot, seat in enumerate(seats)
        ]
        tokens, rows = self._layout(prompts[uniform : len(counts)], counts, chunk)
        if chunk is not None and not all(own[:judged]):
            chunk = chunk.take([slot for slot in range(judged) if own[slot]])
        if chunk is None:
            self._teacher(tokens, positions, plan, lambda *_: None, rows=rows, cache=self._cache)
            return Scores({}, None, before + tokens.shape[0])
        signal = self._teacher(tokens, positions, plan, self._head(chunk), rows=rows, cache=self._cache)
        divergences = self._divergences(signal, chunk)
        self._drop_more_than_asked(signal)
        if Need.STUDENT_TOP_K in self._needs:
            assert chunk.top_ids_SCK is not None
            signal[Field.STUDENT_TOP_IDS] = chunk.top_ids_SCK.flatten(0, 1).to(torch.int32)
        if Need.WRITTEN in self._needs:
            assert chunk.logprobs_SC is not None
            signal[Field.WRITTEN] = chunk.logprobs_SC.flatten()
        if Need.STUDENT_ENTROPY in self._needs:
            assert chunk.entropies_SC is not None
            signal[Field.STUDENT_ENTROPY] = chunk.entropies_SC.flatten()
        return Scores(signal, divergences, before + tokens.shape[0])

    def move(self, source: int, target: int, seat: Seat) -> None:
        """`seat` has moved from slot to slot, with all that is judged."""
        self._cache.move(source, target, seat.position)

    def _read_apart(self, seats: Sequence[Seat], leaders: Mapping[int, int], first: int, own: Sequence[bool]) -> int:
        """Reads the prompts of the seats from `first` on, unless they go into one forward; returns how many tokens it has read."""
        prompts = [
            seat.request.prompt.token_ids[:-1] if mine else ()
            for seat, mine in zip(seats[first:], own[first:], strict=True)
        ]
        tokens = sum(map(len, prompts))
        if tokens <= prefill.PREFILL_TOKENS:
            return 0
        copies = [(leader, slot, seats[slot].position) for slot, leader in leaders.items() if own[slot]]
        prefill.prefill(self._teacher, self._cache, first, prompts, copies)
        return tokens

    def _layout(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int], chunk: Chunk | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The flat input tokens, and which of them are scored (None: all). `prompts` are those of the last slots."""
        uniform = len(counts) - len(prompts)
        written = self._nothing() if chunk is None else chunk.inputs_SC
        judged, width = written.shape
        if not prompts:
            return written.flatten(), None
        rows, at = list(range(uniform * width)), uniform * width
        for slot, count in enumerate(counts[uniform:], uniform):
            at += count
            rows += range(at - width if slot < judged and count else at, at)
        flat = list(itertools.chain.from_iterable(prompts))
        host = torch.tensor(flat + rows, dtype=torch.int64)
        read, rows_N = upload(host, self._cache.device).split([len(flat), len(rows)])
        pieces = [written[:uniform].flatten()]
        for slot, prompt in enumerate(read.split([len(prompt) for prompt in prompts]), uniform):
            pieces += [prompt, written[slot : slot + 1].flatten()] if counts[slot] else []
        return torch.cat(pieces), rows_N

    def _nothing(self) -> torch.Tensor:
        return torch.zeros(0, 0, dtype=torch.int64, device=self._cache.device)

    def _head(self, chunk: Chunk) -> Callable[..., dict[Field, torch.Tensor]]:
        actions = chunk.tokens_SC.flatten()
        top_ids = None if chunk.top_ids_SCK is None else chunk.top_ids_SCK.flatten(0, 1)

        def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[Field, torch.Tensor]:
            def tile(logprobs: torch.Tensor, rows: slice) -> dict[Field, torch.Tensor]:
                ids = None if top_ids is None else top_ids[rows]
                return score_tile(logprobs, actions[rows], ids, self._scored, self._scored_top_k)

            signal = score_head(hidden, weight, bias, self._temperature, tile) if self._scored else {}
            if Need.FULL in self._needs:
                signal[Field.HIDDEN] = hidden
            return signal

        return head

    def _divergences(self, signal: Mapping[Field, torch.Tensor], chunk: Chunk) -> torch.Tensor | None:
        """[S, C] nats."""
        if self._compared is None:
            return None
        if self._compared.head is None:
            student = chunk.top_logprobs_SCK
            assert student is not None
            return top_k_tail_reverse_kl(student, signal[Field.STUDENT_TOP].view_as(student))
        top_k, hidden = self._compared.top_k, chunk.hidden_SCH
        assert hidden is not None
        ids, teacher = (signal[key][:, :top_k] for key in (Field.TEACHER_TOP_IDS, Field.TEACHER_TOP))

        def tile(logprobs: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
            return {"divergence": top_k_tail_reverse_kl(logprobs.gather(-1, ids[rows].long()), teacher[rows])}

        found = score_head(hidden.flatten(0, 1), *self._compared.head, self._temperature, tile)
        return found["divergence"].view(hidden.shape[:2])

    def _drop_more_than_asked(self, signal: dict[Field, torch.Tensor]) -> None:
        """What only the stop rule has asked for is not kept."""
        if Need.STUDENT_TOP_K not in self._needs:
            signal.pop(Field.STUDENT_TOP, None)
        for key in (Field.TEACHER_TOP, Field.TEACHER_TOP_IDS):
            if Need.TEACHER_TOP_K not in self._needs:
                signal.pop(key, None)
            elif key in signal and signal[key].shape[1] > self._teacher_top_k:
                signal[key] = signal[key][:, : self._teacher_top_k].contiguous()

    def _dummy(self) -> Scores:
        read_dummy(self._teacher, self._cache)
        return Scores({}, None)


def read_dummy(teacher: Forward, cache: SlotCache) -> None:
    """A forward of one token, at the last position of a slot, which nobody sees: the slot may be taken."""
    zero = torch.zeros(1, dtype=torch.int64, device=cache.device)
    plan, positions = ragged_plan(cache, 0, [cache.length - 1], [1], 1)
    teacher(zero, positions, plan, lambda *_: None, rows=zero, cache=cache)


class RoutedScorer:
    """Several teachers, each for the seats whose prompts are its own.

    Every teacher has a cache for all slots. Each makes its forward in every round, since a sharded one's is a collective.
    """

    def __init__(self, scorers: Sequence[TeacherScorer]) -> None:
        self._scorers = scorers

    def score(self, seats: Sequence[Seat], leaders: Mapping[int, int], chunk: Chunk | None) -> Scores:
        """Collective; as `TeacherScorer.score`, with rows for all seats."""
        judged, width = (0, 0) if chunk is None else chunk.inputs_SC.shape
        signal: dict[Field, torch.Tensor] = {}
        divergences, tokens = None, 0
        for teacher, scorer in enumerate(self._scorers):
            own = [seat.request.prompt.teacher == teacher for seat in seats]
            part = scorer.score(seats, leaders, chunk if any(own[:judged]) else None, own)
            tokens += part.tokens
            slots = torch.tensor([slot for slot in range(judged) if own[slot]], dtype=torch.int64)
            rows = (slots[:, None] * width + torch.arange(width)).flatten()
            for key, values in part.signal.items():
                if key not in signal:
                    unscored = torch.nan if values.is_floating_point() else 0  # an error where it is read
                    signal[key] = values.new_full((judged * width, *values.shape[1:]), unscored)
                signal[key][upload(rows, values.device)] = values
            if part.divergences is not None:
                if divergences is None:
                    divergences = part.divergences.new_full((judged, width), torch.nan)
                divergences[upload(slots, divergences.device)] = part.divergences
        return Scores(signal, divergences, tokens)

    def move(self, source: int, target: int, seat: Seat) -> None:
        """Of all teachers: nobody but its own reads what a slot of another holds."""
        for scorer in self._scorers:
            scorer.move(source, target, seat)
