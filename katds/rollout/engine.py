"""The rollout engine: rounds of { admit | student decodes C tokens | teacher scores them | stop rule judges | retire }.

With `overlap` the teacher scores, and the rule judges, the chunk before the one that is being decoded.

Invariants: rollouts depend on the request, the seed and the models only, not on slots, chunk size, rank or world size.
Ranks that share a teacher's shards make the same number of rounds, with one control reduction each; decoding itself has no collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch

from katds.core.behaviours.base import Behaviour
from katds.core.collective import Collective
from katds.core.stop.base import StopRule
from katds.core.types import LENGTH, Need, Prompt, Rollout, RolloutBatch, RolloutRequest
from katds.errors import TrainingError
from katds.models.causal import FlatCausalLM, Forward
from katds.rollout.aligned_scorer import Retokeniser
from katds.rollout.decode import Chunk
from katds.rollout.own_scorer import OF_WRITER
from katds.rollout.phase import Phase, PhaseMaker
from katds.rollout.scorer import Scores
from katds.rollout.side import Side
from katds.rollout.signal_log import SignalLog, first_rows
from katds.rollout.sizes import EngineSettings, EngineStats
from katds.rollout.slots import Seat, Slots, assign, natural_end, share

PhaseClock = Callable[[str], AbstractContextManager[None]]  # times a named part, e.g. katds.train.clock.Clock


class StudentSource(Protocol):
    """Where the engine gets the student's whole weights from, for the length of one rollout phase."""

    def decoding(self) -> AbstractContextManager[FlatCausalLM]: ...


class RolloutEngine:
    """Writes rollouts with continuous batching over `settings.slots` slots per rank.

    Args:
        teachers: each lends a teacher for a rollout phase; a prompt says which is its own. None at all: writes without scores
            (evaluation), or what writes is the teacher; the rule must then need no divergence, and `needs` only what a writer knows.
        needs: what the objective asks of the teacher.
        clock: told of the parts "control", "prefill", "decode", "teacher" and "judge".
        say: told what a user should know, once.
        behaviour: who writes; one that lets the teacher write along needs a teacher that is lent whole.
        retokenise: for a teacher with another tokenizer, which then serves `Need.CHUNKS` and nothing else: begins a rollout of this prompt.
        lockstep: the block of ranks that teachers are sharded over, if these are not all. Each block is given its part of the requests
            beforehand and writes it at its own pace: no block waits for another before the end of the phase, nor takes over its requests.
    """

    def __init__(
        self,
        student: StudentSource,
        teachers: Sequence[Callable[[], AbstractContextManager[Forward]]],
        rule: StopRule,
        needs: frozenset[Need],
        collective: Collective,
        settings: EngineSettings,
        clock: PhaseClock,
        say: Callable[[str], None] = lambda _: None,
        behaviour: Behaviour | None = None,
        retokenise: Callable[[Prompt], Retokeniser] | None = None,
        lockstep: Collective | None = None,
    ) -> None:
        if not teachers and (needs - OF_WRITER or rule.needs_divergence):
            raise ValueError("an objective or stop rule needs the teacher's signal, but the engine has no teacher")
        if (Need.CHUNKS in needs) != (retokenise is not None):
            raise ValueError(
                f"chunks of text need a teacher with another tokenizer, and it has nothing else; needs are {sorted(needs)}"
            )
        compares = Need.CHUNKS not in needs and (rule.needs_divergence or Need.STUDENT_TOP_K in needs)
        if settings.top_k < 1 and compares:
            raise ValueError(f"top_k is {settings.top_k}; the divergence needs at least 1 of the student's best tokens")
        self._student = student
        self._rule = rule
        self._collective = collective
        self._lockstep = lockstep or collective
        self._settings = settings
        self._clock = clock
        self._teachers = teachers
        by_teacher = compares and rule.reads_teacher_top_k
        by_student = compares and (not by_teacher or Need.STUDENT_TOP_K in needs)
        of_writer = not teachers and Need.TEACHER_TOP_K in needs
        top_k = settings.top_k if by_student or of_writer else 0
        self._phases = PhaseMaker(
            settings, needs, top_k, compares, by_teacher, len(teachers), say, behaviour, retokenise
        )
        self._side = Side(settings.device, settings.overlap)
        self.stats = EngineStats()
        self._finite = True  # the divergences of this rank, then of its block

    @torch.no_grad()
    def generate(self, requests: Sequence[RolloutRequest], stream: int) -> RolloutBatch:
        """Collective: writes all `requests` (the same list on every rank); returns those that this rank wrote.

        `stream` names the random numbers together with the rollout ids, e.g. the training step.

        Raises TrainingError on all ranks if a divergence on any of them is not finite.
        """
        self.stats = EngineStats()
        self._finite = True
        # Audit rollouts run to their natural end and are the longest: begun first, they do not prolong the phase.
        queue = sorted(requests, key=lambda request: not request.audit)
        blocks, block = self._collective.size // self._lockstep.size, self._collective.rank // self._lockstep.size
        queue = share(queue, blocks)[block]
        done: list[tuple[Rollout, list[tuple[int, int]]]] = []
        signal = SignalLog()
        with ExitStack() as lent:
            model = lent.enter_context(self._student.decoding())
            teachers = [lent.enter_context(lend()) for lend in self._teachers]
            phase = self._phases(model, teachers, requests, stream)
            self._side.mark()
            try:
                self._rounds(phase, queue, signal, done)
            finally:
                self._side.join()
            del phase  # the caches, before the signal is laid end to end
        self._end_together()
        done.sort(key=lambda pair: pair[0].id)
        return RolloutBatch([rollout for rollout, _ in done], signal.collect([rows for _, rows in done]))

    def _rounds(
        self,
        phase: Phase,
        queue: list[RolloutRequest],
        signal: SignalLog,
        done: list[tuple[Rollout, list[tuple[int, int]]]],
    ) -> None:
        """Collective of the block: rounds until none of its ranks has anything left to write, or one has failed."""
        while True:
            leaders, busy = self._admit(phase.slots, queue)
            if not busy:
                break
            self.stats.rounds += 1
            written = self._write(phase, leaders)
            chunk, phase.flight = (phase.flight, written) if self._settings.overlap else (written, None)
            with self._side.open():
                scores = self._score(phase, leaders, chunk)
                ended = [] if chunk is None else self._judge(phase, chunk, scores, signal, done)
            self._retire(phase, ended)
            del written, chunk, scores  # the next chunk needs their room

    def _admit(self, slots: Slots, queue: list[RolloutRequest]) -> tuple[dict[int, int], bool]:
        """Collective of the block: the round's control reduction. Returns the followers' leaders, and whether any rank is busy."""
        rank, size = self._lockstep.rank, self._lockstep.size
        report = torch.zeros(3, size, dtype=torch.int64)
        report[0, rank], report[1, rank], report[2, rank] = slots.free, len(slots.seats), not self._finite
        with self._clock("control"):
            free, live, failed = self._lockstep.sum(report).tolist()
        if any(failed):
            self._finite = False
            return {}, False
        given = assign(free, live, (r.prompt.index for r in queue))
        mine = [queue[i] for i in given[rank]]
        del queue[: sum(map(len, given))]
        leaders = slots.admit(mine)
        for request in mine:
            self._rule.begin(request)
        return leaders, sum(live) + sum(map(len, given)) > 0

    def _end_together(self) -> None:
        """Collective: raises on all ranks where a divergence on any is not finite. The ranks of a block know that of each other."""
        failed = torch.tensor([not self._finite])
        if self._lockstep.size < self._collective.size:
            with self._clock("control"):  # the wait for the slowest block
                failed = self._collective.max(failed.long())
        if bool(failed):
            raise _not_finite()

    def _write(self, phase: Phase, leaders: dict[int, int]) -> Chunk | None:
        seats = phase.slots.seats
        if not seats:
            return None
        with self._clock("prefill"):
            phase.decoder.prefill(seats, leaders)
            if phase.guided:
                self._prime(phase, leaders)
        with self._clock("decode"):
            chunk = phase.decoder.decode(seats, self._settings.chunk_tokens, phase.flight)
        self.stats.decoded_tokens += chunk.tokens_SC.numel()
        self.stats.decode_steps[len(seats)] += chunk.tokens_SC.shape[1]
        if phase.guided:
            self.stats.teacher_tokens[len(seats)] += chunk.tokens_SC.shape[1]
        return chunk

    def _prime(self, phase: Phase, leaders: dict[int, int]) -> None:
        """The teacher reads the prompts of fresh seats before it writes along; it does not read them again with the chunk."""
        assert phase.scorer is not None
        seats = phase.slots.seats
        if any(seat.fresh for seat in seats):
            phase.scorer.score(seats, leaders, None)
        leaders.clear()
        for seat in seats:
            seat.fresh = False

    def _score(self, phase: Phase, leaders: dict[int, int], chunk: Chunk | None) -> Scores:
        if phase.scorer is None:
            return Scores({}, None)
        with self._clock("teacher"):
            scores = phase.scorer.score(phase.slots.seats, leaders, chunk)
        self.stats.teacher_tokens[scores.tokens] += 1
        return scores

    def _judge(
        self,
        phase: Phase,
        chunk: Chunk,
        scores: Scores,
        signal: SignalLog,
        done: list[tuple[Rollout, list[tuple[int, int]]]],
    ) -> list[int]:
        """Reads the chunk on the host (the round's one synchronisation) and asks the rule; returns the slots that have ended."""
        with self._clock("judge"):
            tokens_SC = chunk.tokens_SC.tolist()
            counts = [len(tokens) for tokens in tokens_SC] if scores.counts is None else scores.counts
            scored = scores.divergences
            divergences = [0.0] * sum(counts) if scored is None else scored.flatten().tolist()
            if not all(map(math.isfinite, divergences)):
                self._finite = False  # told to all ranks in the next round, so that they end together
                return []
            row, judged = signal.add(scores.signal), 0
            ended = []
            for slot, (tokens, count) in enumerate(zip(tokens_SC, counts, strict=True)):
                seat = phase.slots.seats[slot]
                seat.ahead += tokens
                part = divergences[judged : judged + count]
                before = len(seat.response)
                reason = self._advance(seat, count, part, scored is not None, slot in scores.full)
                seat.spans.append((row + judged, len(seat.response) - before))
                judged += count
                if reason is not None:
                    rollout = seat.finish(reason)
                    rollout.hole = self._rule.end(seat.request, rollout.terminated)
                    self.stats.tokens += len(rollout.response_ids)
                    ended.append(slot)
                    done.append((rollout, first_rows(seat.spans, rollout.kept)))
            return ended

    def _retire(self, phase: Phase, ended: Sequence[int]) -> None:
        """Frees slots: the last live ones move into their places, with their keys and what they have in flight."""
        for seat in phase.slots.seats:
            seat.fresh = False
        order = list(range(len(phase.slots.seats)))
        flying = 0 if phase.flight is None else phase.flight.tokens_SC.shape[1]
        for source, target in phase.slots.retire(ended):
            order[target] = source
            tokens = phase.slots.seats[target].position
            phase.cache.move(source, target, tokens + flying)
            with self._side.open():
                if phase.scorer is not None:
                    phase.scorer.move(source, target, phase.slots.seats[target])
        if phase.flight is not None and ended:
            phase.flight = phase.flight.take(order[: len(phase.slots.seats)])
        self._side.mark()

    def _advance(self, seat: Seat, count: int, divergences: list[float], scored: bool, full: bool) -> str | None:
        """Appends the next `count` tokens that the seat has written to its response, up to its end; returns why it ended, or None.

        Order of checks: a natural end at the very token at which the rule would fire is a natural end.
        `full`: it ends with these tokens.
        """
        tokens, seat.ahead = seat.ahead[:count], seat.ahead[count:]
        room = seat.request.max_new_tokens - len(seat.response)
        written, reason = natural_end(tokens, room, self._settings.eos_ids)
        if full and reason is None:
            reason = LENGTH
        cut = self._rule.observe(seat.request, tokens[:written], divergences[:written]) if written else None
        if cut is not None and (reason is None or cut.at < len(seat.response) + written):
            seat.cut = cut
            if not seat.request.audit:
                written, reason = cut.at - len(seat.response), cut.reason
        seat.response += tokens[:written]
        if scored and self._settings.keep_divergences:
            seat.divergences += divergences[:written]
        seat.pending = (seat.ahead or seat.response or [seat.pending])[-1]
        return reason


def _not_finite() -> TrainingError:
    return TrainingError(
        "The divergence of student and teacher is not a finite number. Look at the logits of both models, or lower "
        "train.optimizer.lr; run.resume goes on from the last checkpoint."
    ).everywhere()
