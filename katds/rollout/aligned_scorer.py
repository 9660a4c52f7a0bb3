"""A teacher with another tokenizer reads along: it scores the text of the student's chunks in tokens of its own.

What it reads lags behind: tokens of a text are sure only once the next piece of it has begun. So each seat has a place of its own in the
teacher's cache, and student tokens are judged once the chunk of text that they are in is complete. All else is as in
`katds.rollout.scorer`: one ragged forward per round, with the prompts of fresh seats, and a dummy token where there is nothing to read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from katds.core.alignment import UNSAID_DIVERGENCE, Reading, chunk_divergence
from katds.core.teacher_signal import score_tile
from katds.core.types import EOS, Field, Need, Prompt
from katds.models.causal import Forward
from katds.models.plans import upload
from katds.models.slot_cache import SlotCache, ragged_plan
from katds.models.tiled_head import score_head
from katds.rollout.decode import Chunk
from katds.rollout.scorer import Scores, read_dummy
from katds.rollout.slots import Seat, natural_end

SERVES = frozenset({Need.CHUNKS, Need.WRITTEN})
LEAST_GROWTH = 64  # tokens of the cache at once


class Retokeniser(Protocol):
    """A rollout in the teacher's tokens; see `katds.data.retokenize`."""

    @property
    def context(self) -> int:
        """Tokens that the teacher can read at most, prompt included."""
        ...

    def read(self, tokens: Sequence[int]) -> Reading: ...
    def finish(self, ended: bool) -> Reading: ...


@dataclass(slots=True)
class _Reader:
    """The teacher's place in a rollout: `pending` is its next input, at `position`."""

    text: Retokeniser
    pending: int
    position: int
    logprobs: list[float] = field(
        default_factory=list
    )  # of student tokens that are in no complete chunk yet, as written
    scores: list[float] = field(default_factory=list)  # of teacher tokens likewise


class AlignedScorer:
    """Scores what was written, chunk of text by chunk of text.

    The round's two host synchronisations: the written tokens, before the teacher reads; its scores, from which the host makes all sums, in
    float64 and in the order of the tokens, so that they are the same however the rollout was split.

    Args:
        make: a forward of the teacher for a cache; asked again when the cache has grown.
        cache: the teacher's, to begin with. A text may have more tokens for it than for the student: the cache grows.
        retokenise: asked once per rollout.
        eos_ids: the student's.
        needs: what the objective asks for.
        temperature: that of the rollout, for the teacher as for the student.
    """

    def __init__(
        self,
        make: Callable[[SlotCache], Forward],
        cache: SlotCache,
        retokenise: Callable[[Prompt], Retokeniser],
        eos_ids: Sequence[int],
        needs: frozenset[Need],
        temperature: float,
    ) -> None:
        if needs - SERVES:
            names = ", ".join(sorted(needs - SERVES))
            raise ValueError(f"a teacher with another tokenizer cannot tell {names}: these are of tokens, not of text")
        self._make, self._cache, self._teacher = make, cache, make(cache)
        self._retokenise, self._eos_ids, self._needs, self._temperature = retokenise, eos_ids, needs, temperature
        self._readers: dict[int, _Reader] = {}  # by rollout

    @torch.no_grad()
    def score(self, seats: Sequence[Seat], leaders: Mapping[int, int], chunk: Chunk | None) -> Scores:
        """Collective where the teacher is sharded. Reads `chunk`, which all of `seats` have written, and the prompts of fresh
        seats. `Scores` has rows for the student tokens whose chunk of text is complete."""
        readers = {seat.request.id: self._readers.get(seat.request.id) or self._begin(seat) for seat in seats}
        self._readers = readers
        if chunk is None:
            assert not seats, "every seat has written"
            return self._dummy()
        readings = self._read(seats, chunk)
        tokens = self._forward(seats, leaders, readings)
        return self._resolve([readers[seat.request.id] for seat in seats], readings, tokens)

    def move(self, source: int, target: int, seat: Seat) -> None:
        """`seat` has moved from slot to slot."""
        self._cache.move(source, target, self._readers[seat.request.id].position)

    def _begin(self, seat: Seat) -> _Reader:
        prompt = seat.request.prompt
        return _Reader(self._retokenise(prompt), prompt.teacher_ids[-1], len(prompt.teacher_ids) - 1)

    def _read(self, seats: Sequence[Seat], chunk: Chunk) -> list[Reading]:
        """On the host: what each seat has written is to the teacher."""
        assert chunk.logprobs_SC is not None
        readings = []
        for seat, tokens, logprobs in zip(seats, chunk.tokens_SC.tolist(), chunk.logprobs_SC.tolist(), strict=True):
            reader, room = self._readers[seat.request.id], seat.request.max_new_tokens - seat.written
            count, reason = natural_end(tokens, room, self._eos_ids)
            reader.logprobs += logprobs[:count]
            reading = reader.text.read(tokens[: count - (reason == EOS)])
            if reason is not None:
                last = reader.text.finish(ended=reason == EOS)
                reading = last._replace(
                    teacher_ids=reading.teacher_ids + last.teacher_ids, chunks=reading.chunks + last.chunks
                )
            readings.append(reading)
        return readings

    def _forward(self, seats: Sequence[Seat], leaders: Mapping[int, int], readings: Sequence[Reading]) -> int:
        """Collective: the teacher reads what is new to it; hands each reader its scores. Returns the tokens that the forward read."""
        first = len(seats) - sum(seat.fresh for seat in seats) + len(leaders)  # from here on prompts are read
        starts: list[int] = []
        inputs: list[list[int]] = []
        rows: list[int] = []
        targets: list[int] = []
        ended: list[bool] = []  # targets that stand for any end token
        at = 0
        for slot, (seat, reading) in enumerate(zip(seats, readings, strict=True)):
            reader, new = self._readers[seat.request.id], reading.teacher_ids
            prompt = seat.request.prompt.teacher_ids[:-1] if slot >= first else ()
            starts.append(0 if slot >= first else reader.position)
            inputs.append([*prompt, *([reader.pending, *new[:-1]] if new else [])])
            at += len(inputs[-1])
            rows += range(at - len(new), at)
            targets += new
            ended += [bool(reading.end_ids) and i == len(new) for i in range(1, len(new) + 1)]
        if at == 0:
            return self._dummy().tokens
        self._fit(max(start + len(tokens) for start, tokens in zip(starts, inputs, strict=True)))
        copies = [(leader, slot, len(seats[slot].request.prompt.teacher_ids) - 1) for slot, leader in leaders.items()]
        plan, positions = ragged_plan(self._cache, 0, starts, [len(tokens) for tokens in inputs], 0, copies)
        flat = list(itertools.chain.from_iterable(inputs))
        ends = next((reading.end_ids for reading in readings if reading.end_ids), ())
        host = torch.tensor([*flat, *rows, *targets, *ended, *ends], dtype=torch.int64)
        parts = [at, len(rows), len(rows), len(rows), len(ends)]
        tokens_N, rows_T, targets_T, ended_T, ends_E = upload(host, self._cache.device).split(parts)
        head = self._head(targets_T, ended_T.bool(), ends_E) if targets else lambda *_: None
        signal = self._teacher(tokens_N, positions, plan, head, rows=rows_T, cache=self._cache)
        scores = iter(signal[Field.SAMPLED].tolist() if targets else [])
        for seat, reading in zip(seats, readings, strict=True):
            if reading.teacher_ids:
                reader, count = self._readers[seat.request.id], len(reading.teacher_ids)
                reader.scores += itertools.islice(scores, count)
                reader.position, reader.pending = reader.position + count, reading.teacher_ids[-1]
        return at

    def _head(
        self, targets_T: torch.Tensor, ended_T: torch.Tensor, ends_E: torch.Tensor
    ) -> Callable[..., dict[Field, torch.Tensor]]:
        """The likelihood of each target; where the text has ended, that of any of the end tokens."""

        def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[Field, torch.Tensor]:
            def tile(logprobs: torch.Tensor, rows: slice) -> dict[Field, torch.Tensor]:
                signal = score_tile(logprobs, targets_T[rows], None, {Need.SAMPLED}, 0)
                if len(ends_E) > 1:
                    any_end = logprobs[:, ends_E].logsumexp(-1)
                    signal[Field.SAMPLED] = torch.where(ended_T[rows], any_end, signal[Field.SAMPLED])
                return signal

            return score_head(hidden, weight, bias, self._temperature, tile)

        return head

    def _resolve(self, readers: Sequence[_Reader], readings: Sequence[Reading], tokens: int) -> Scores:
        """The rows of all student tokens whose chunk is complete, seat after seat."""
        teacher: list[float] = []
        student: list[float] = []
        sizes: list[int] = []
        written: list[float] = []
        divergences: list[float] = []
        counts = []
        for reader, reading in zip(readers, readings, strict=True):
            begin = end = 0  # teacher tokens, student tokens
            for chunk in reading.chunks:
                said = sum(reader.scores[begin : begin + chunk.teacher])
                wrote = sum(reader.logprobs[end : end + chunk.student])
                begin, end = begin + chunk.teacher, end + chunk.student
                teacher += [said] * chunk.student
                student += [wrote] * chunk.student
                sizes += [chunk.student if chunk.teaches else 0] * chunk.student
                if chunk.student:  # of the teacher's own alone nobody asks
                    said_it = chunk.same and chunk.teacher > 0
                    known = chunk_divergence(said, wrote) / chunk.student if said_it else UNSAID_DIVERGENCE
                    divergences += [known] * chunk.student
            written += reader.logprobs[:end]
            del reader.scores[:begin], reader.logprobs[:end]
            counts.append(end)
        signal = {
            Field.CHUNK_TEACHER: self._upload(teacher),
            Field.CHUNK_STUDENT: self._upload(student),
            Field.CHUNK_TOKENS: self._upload(sizes, torch.int32),
        }
        if Need.WRITTEN in self._needs:
            signal[Field.WRITTEN] = self._upload(written)
        full = frozenset(slot for slot, reading in enumerate(readings) if reading.full)
        return Scores(signal, torch.tensor(divergences), tokens, counts, full)

    def _upload(self, values: list[Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return upload(torch.tensor(values, dtype=dtype), self._cache.device)

    def _fit(self, positions: int) -> None:
        """Grows the cache to hold so many, and the dummy's; by some more than is asked for, as far as the teacher can read."""
        if positions < self._cache.length:
            return
        context = max(reader.text.context for reader in self._readers.values())
        assert positions <= context, f"{positions} tokens for a teacher that reads {context}"
        del self._teacher  # it may hold the buffers
        self._cache.grow(min(positions + max(positions // 8, LEAST_GROWTH), context) + 1)
        self._teacher = self._make(self._cache)

    def _dummy(self) -> Scores:
        read_dummy(self._teacher, self._cache)
        return Scores({}, None)
