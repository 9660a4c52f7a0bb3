"""Greedy rollouts are what transformers generates, token for token."""

from __future__ import annotations

import pytest
import torch
from rollout_setup import VOCABULARY, Models, engine, models, prompts

from katds.core.types import EOS, LENGTH, RolloutRequest
from katds.rollout.sampling import Sampling

LENGTHS, NEW = [6, 1, 9, 2, 14, 3, 5], 22


def generate(pair: Models, prompt: tuple[int, ...], eos: list[int] | None) -> list[int]:
    padding = list(range(VOCABULARY, pair.plain_student.config.vocab_size))
    out = pair.plain_student.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, suppress_tokens=padding,
        eos_token_id=eos if eos else -1, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_rollouts_equal_transformers_generate(tied: bool) -> None:
    pair = models(torch.float32, tied)
    some = prompts(LENGTHS)
    free = [generate(pair, prompt.token_ids, None) for prompt in some]
    assert all(len(ids) == NEW for ids in free)
    eos = [free[0][6], free[2][13]]
    expected = [generate(pair, prompt.token_ids, eos) for prompt in some]
    requests = [RolloutRequest(5 + i, prompt, NEW) for i, prompt in enumerate(some)]
    for slots, chunk in ((3, 4), (1, 16), (2, 1), (7, 5)):
        rollouts = engine(
            pair, slots=slots, chunk_tokens=chunk, eos_ids=tuple(eos), sampling=Sampling(temperature=0.0)
        ).generate(requests, 0).rollouts  # fmt: skip
        assert [r.response_ids for r in rollouts] == expected
        assert [r.reason == EOS for r in rollouts] == [ids[-1] in eos for ids in expected]
        assert {r.reason for r in rollouts} == {EOS, LENGTH}
