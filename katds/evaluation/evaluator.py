"""avg@k and pass@k of a model, through the same rollout engine as training, with no stop rule and no teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from katds.core.collective import Collective
from katds.core.types import EOS, Prompt, Rollout
from katds.evaluation.metrics import Sample, Scores, score
from katds.rollout.engine import RolloutEngine
from katds.rollout.requests import requests_for

# Numbers of their own, the same for every evaluation: before and after are compared on common random numbers.
_STREAM = 0x4556414C


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates whatever weights the engine's student holds.

    Args:
        engine: without teacher, with the rule `never`.
        grade: (response text, reference answer) -> right or wrong.
        to_text: decodes token ids without special tokens.
    """

    engine: RolloutEngine
    prompts: Sequence[Prompt]
    samples: int
    k: int
    max_new_tokens: int
    grade: Callable[[str, str], bool]
    to_text: Callable[[Sequence[int]], str]
    collective: Collective

    def run(self) -> Scores:
        """Collective: writes `samples` rollouts per problem, grades each where it was written, returns the scores on every rank."""
        requests = requests_for(self.prompts, self.samples, self.max_new_tokens)
        batch = self.engine.generate(requests, stream=_STREAM)
        graded = {rollout.id: self._sample(rollout) for rollout in batch.rollouts}
        merged: dict[int, Sample] = {}
        for part in self.collective.gather(graded):
            merged |= part
        ordered = [merged[request.id] for request in requests]
        return score([ordered[i : i + self.samples] for i in range(0, len(ordered), self.samples)], self.k)

    def _sample(self, rollout: Rollout) -> Sample:
        answer = rollout.request.prompt.answer
        right = answer is not None and self.grade(self.to_text(rollout.response_ids), answer)
        return Sample(right, len(rollout.response_ids), rollout.reason == EOS)


def text_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids -> text, special tokens left out."""

    def to_text(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    return to_text
