"""The task: every problem ends, traces teach what they say, text and tokens agree, a seed fixes everything."""

import random
import re
from itertools import pairwise

import pytest
from transformers import PreTrainedTokenizerFast

from katds.data import orbit
from katds.data.orbit import EOS, MODULUS, STEP_TOKENS, Problem, Trace

SAMPLE = random.Random(0).sample(orbit.all_problems(), 100)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return orbit.build_tokenizer()


def results(words: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """(value, multiplier, result) of each step of a trace."""
    starts = range(0, len(words) - STEP_TOKENS + 1, STEP_TOKENS)
    return [(int(words[i]), int(words[i + 2]), int(words[i + 4])) for i in starts]


def off_path(seed: int, slip_rate: float = 0.3, steps: int = 40) -> list[Trace]:
    rng = random.Random(seed)
    return [orbit.off_path_trace(problem, rng, slip_rate, steps) for problem in SAMPLE]


@pytest.mark.parametrize("problem", orbit.all_problems()[::97], ids=lambda problem: problem.prompt)
def test_clean_trace_multiplies_until_the_bound_and_ends(problem: Problem) -> None:
    words = orbit.clean_trace(problem)
    steps = results(words)
    assert steps[0][0] == problem.start
    assert all(result == value * problem.multiplier % MODULUS for value, _, result in steps)
    assert all(left[2] == right[0] for left, right in pairwise(steps))
    assert [result < problem.bound for *_, result in steps] == [False] * (len(steps) - 1) + [True]
    assert words[-3:] == ("!", problem.answer, EOS)


def test_every_problem_ends_soon_with_its_answer() -> None:
    for problem in orbit.all_problems():
        text = " ".join(orbit.clean_trace(problem))
        assert orbit.answer_of(text) == problem.answer
        assert 0 < int(problem.answer) < problem.bound <= problem.start
        assert len(text.split()) <= max(orbit.ORDERS) * STEP_TOKENS


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_text_and_tokens_agree(tokenizer: PreTrainedTokenizerFast, skip_special_tokens: bool) -> None:
    for problem in SAMPLE:
        words = orbit.clean_trace(problem)
        ids = tokenizer(" ".join(words))["input_ids"]
        assert ids == orbit.encode(words)
        text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        assert text.split() == list(words[:-1] if skip_special_tokens else words)
        assert orbit.answer_of(text) == problem.answer
        assert re.findall(orbit.ANSWER_PATTERN, text) == [problem.answer]


def test_chat_template_makes_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    for problem in SAMPLE:
        message = {"role": "user", "content": problem.prompt}
        ids = tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
        assert ids == orbit.encode(orbit.prompt_words(problem))
        assert orbit.WORD_ID[orbit.UNKNOWN] not in ids
    reply = [message, {"role": "assistant", "content": "1 * 2"}]
    assert tokenizer.apply_chat_template(reply, tokenize=False).split()[-4:] == ["1", "*", "2", EOS]
    assert tokenizer.eos_token_id == orbit.WORD_ID[EOS]
    assert tokenizer.pad_token_id == orbit.WORD_ID[orbit.PAD]
    assert len(tokenizer) == len(orbit.WORDS) == len(set(orbit.WORDS))


def test_rollouts_without_an_end_have_no_answer() -> None:
    for text in ("", "17 * 5 = 85 ; 85 * 5 = 37 ;", "17 * 5 = 85 !", "17 * 5 = 2 ! 2 * 5", "17 * 5 = 2"):
        assert orbit.answer_of(text) is None


def test_off_path_traces_read_slips_and_learn_products() -> None:
    slips = 0
    for trace in off_path(seed=1):
        for (value, multiplier, _), (*_, target) in zip(results(trace.words), results(trace.targets), strict=True):
            assert target == value * multiplier % MODULUS
        differing = [i for i, pair in enumerate(zip(trace.words, trace.targets, strict=True)) if pair[0] != pair[1]]
        assert all(i % STEP_TOKENS == STEP_TOKENS - 2 for i in differing)
        slips += len(differing)
    steps = sum(len(results(trace.words)) for trace in off_path(seed=1))
    assert slips / steps == pytest.approx(0.3, abs=0.05)


def test_misconceptions_are_the_given_share_of_the_facts_that_problems_use() -> None:
    used = {(value, a) for problem in orbit.all_problems() for value, a, _ in results(orbit.clean_trace(problem))}
    wrong = orbit.misconceptions(seed=0)
    assert set(wrong) <= used
    assert len(wrong) == round(len(used) / 3)
    for (value, multiplier), result in wrong.items():
        assert result != value * multiplier % MODULUS
        assert max(orbit.BOUNDS) <= result < MODULUS


def test_noisy_traces_believe_misconceptions_at_the_given_rate() -> None:
    wrong, rng = orbit.misconceptions(seed=0), random.Random(0)
    believed = met = 0
    for problem in orbit.all_problems():
        trace = orbit.noisy_trace(problem, rng, wrong, wrong_rate=0.8, slip_rate=0.1, max_steps=10)
        for value, multiplier, target in results(trace.targets):
            fact = (value, multiplier)
            if fact not in wrong:
                assert target == value * multiplier % MODULUS
            else:
                met += 1
                believed += target == wrong[fact]
    assert believed / met == pytest.approx(0.8, abs=0.03)


def test_split_is_disjoint_complete_and_depends_on_the_seed() -> None:
    train, evaluation = orbit.split_problems(seed=3, eval_size=100)
    assert len(evaluation) == 100
    assert sorted(train + evaluation) == sorted(orbit.all_problems())
    assert orbit.split_problems(seed=3, eval_size=100) == (train, evaluation)
    assert orbit.split_problems(seed=4, eval_size=100)[1] != evaluation
    with pytest.raises(ValueError, match="eval_size is 0; give"):
        orbit.split_problems(seed=3, eval_size=0)


def test_a_seed_fixes_everything_random() -> None:
    assert off_path(seed=5) == off_path(seed=5) != off_path(seed=6)
    assert orbit.misconceptions(0) == orbit.misconceptions(0) != orbit.misconceptions(1)
