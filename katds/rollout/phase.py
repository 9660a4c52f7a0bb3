"""What lives for one rollout phase: caches, decoder and teachers' scorers, around models that are lent for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from katds.core.behaviours.base import Behaviour
from katds.core.types import Need, Prompt, RolloutRequest
from katds.models.causal import FlatCausalLM, Forward
from katds.models.slot_cache import SlotCache
from katds.models.step import ForwardMaker, StepMaker
from katds.rollout.aligned_scorer import AlignedScorer, Retokeniser
from katds.rollout.decode import Chunk, Decoder
from katds.rollout.own_scorer import OwnScorer
from katds.rollout.scorer import Compared, RoutedScorer, Scorer, TeacherScorer
from katds.rollout.sizes import EngineSettings
from katds.rollout.slots import Slots


@dataclass(slots=True)
class Phase:
    """What lives for one call of `generate`."""

    slots: Slots
    cache: SlotCache  # of the student
    decoder: Decoder
    scorer: Scorer | None
    flight: Chunk | None = None  # written by the live slots, not yet judged
    guided: bool = False  # the teacher writes along


class PhaseMaker:
    """Makes the phases of one engine; remembers what serves its models, and with `keep_decoder` the student's cache and step.

    Args:
        top_k: of the student's tokens, as far as anyone asks for them; 0: nobody does.
        compares: student and teacher are compared at each token; by_teacher: on the teacher's `settings.top_k`.
        teachers: how many there will be.
        retokenise: see `RolloutEngine`.
    """

    def __init__(
        self,
        settings: EngineSettings,
        needs: frozenset[Need],
        top_k: int,
        compares: bool,
        by_teacher: bool,
        teachers: int,
        say: Callable[[str], None],
        behaviour: Behaviour | None,
        retokenise: Callable[[Prompt], Retokeniser] | None = None,
    ) -> None:
        self._settings, self._needs, self._top_k, self._behaviour = settings, needs, top_k, behaviour
        self._retokenise, self._compares, self._by_teacher = retokenise, compares, by_teacher
        self._steps = StepMaker(settings.fast_decode, settings.keep_decoder, say)
        self._forwards = [ForwardMaker(settings.fast_decode, say) for _ in range(teachers)]
        self._guides = StepMaker(settings.fast_decode, False, say)  # of a teacher that writes along

    def __call__(
        self, model: FlatCausalLM, teachers: Sequence[Forward], requests: Sequence[RolloutRequest], stream: int
    ) -> Phase:
        """The caches are freed with the phase, when the learner needs the memory; with `keep_decoder`, all but the student's."""
        settings, sampling, needs = self._settings, self._settings.sampling, self._needs
        # A slot may overshoot its end by less than a chunk, and by the one in flight.
        overshoot = settings.chunk_tokens * (2 if settings.overlap else 1)
        length = max((len(r.prompt.token_ids) + r.max_new_tokens for r in requests), default=1) + overshoot
        slots = min(settings.slots, max(len(requests), 1))
        made = self._steps(model, slots, length, settings.device)
        if self._retokenise is not None:
            decoder = Decoder(
                made.forward, made.step, made.cache, sampling, 0, needs | {Need.WRITTEN}, settings.seed, stream
            )
            return Phase(Slots(slots), made.cache, decoder, self._aligned(teachers, requests, slots))
        mix, guide = None if self._behaviour is None else self._behaviour.at(stream), None
        if mix is not None:
            (teacher,) = teachers
            assert isinstance(teacher, FlatCausalLM), "a teacher that writes along is lent whole"
            beside = self._guides(teacher, slots, length, settings.device)
            guide, readers = (beside.step, mix), [(beside.forward, beside.cache)]
        else:
            caches = [SlotCache(slots, length, settings.device) for _ in teachers]
            readers = [
                (make(teacher, cache), cache)
                for make, teacher, cache in zip(self._forwards, teachers, caches, strict=True)
            ]
        decoder = Decoder(
            made.forward,
            made.step,
            made.cache,
            sampling,
            self._top_k,
            needs,
            settings.seed,
            stream,
            guide,
            self._by_teacher,
        )
        head = model.head_parameters() if self._by_teacher else None
        compared = Compared(settings.top_k, head) if self._compares else None
        teacher_top_k = settings.teacher_top_k or settings.top_k
        scorers = [
            TeacherScorer(
                reader, cache, needs, compared, teacher_top_k, sampling.scale, isinstance(teacher, FlatCausalLM)
            )
            for teacher, (reader, cache) in zip(teachers, readers, strict=True)
        ]
        alone = OwnScorer() if needs else None
        scorer = RoutedScorer(scorers) if len(scorers) > 1 else next(iter(scorers), alone)
        return Phase(Slots(slots), made.cache, decoder, scorer, guided=guide is not None)

    def _aligned(self, teachers: Sequence[Forward], requests: Sequence[RolloutRequest], slots: int) -> AlignedScorer:
        """The scorer of a teacher with another tokenizer. Its cache is made for texts that are as long in its tokens as in the
        student's, and grows."""
        assert self._retokenise is not None
        settings, (teacher,) = self._settings, teachers
        length = max((len(r.prompt.teacher_ids) + r.max_new_tokens for r in requests), default=1) + 1
        cache = SlotCache(slots, length, settings.device)
        make = partial(self._forwards[0], teacher)
        return AlignedScorer(make, cache, self._retokenise, settings.eos_ids, self._needs, settings.sampling.scale)
