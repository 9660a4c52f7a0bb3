"""The task "orbit": arithmetic in which rollouts really get trapped, small enough for one CPU core.

A problem `s * a < c :` asks for the first value below `c` on the orbit x -> x * a mod 97 that starts at `s`. The chain
of thought writes one product per step and the value at the end:

    17 * 33 = 76 ; 76 * 33 = 83 ; ... 50 * 33 = 1 ! 1 <eos>

Every problem ends. But one wrong product leads onto another orbit, and most orbits never come below `c`: the rollout
goes round for ever, each of its steps correct. A teacher that reads such a rollout agrees with all of it, so nothing is
left to learn there: a trap for distillation that comes from the task, without any planted repetition.

Three kinds of traces are made here: clean ones, off-path ones (some results slipped; from them the teacher learns to
go on correctly from any prefix), and noisy ones (the student's schooling: it learns misconceptions, wrong products that
it believes in).

Invariants: everything is a pure function of its arguments and seeds; a word is one token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODULUS = 97
ORDERS = (3, 4, 6, 8, 12, 16, 24)  # multiplicative orders of the multipliers, that is lengths of the orbits
BOUNDS = (2, 3, 4)
STEP_TOKENS = 6  # "x * a = y ;"
MAX_TOKENS = 1024  # prompt and response

ANSWER_PATTERN = r"!\s*(\d+)(?:\s*<eos>)?\s*$"
"""Group 1 is the final answer of a decoded response, special tokens shown or not. A rollout that never ends: no match."""

PAD, EOS, UNKNOWN, SYSTEM, USER, ASSISTANT = "<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"
SPECIAL_WORDS = (PAD, EOS, UNKNOWN, SYSTEM, USER, ASSISTANT)
WORDS = (*SPECIAL_WORDS, "*", "=", ";", "!", "<", ":", *(str(number) for number in range(MODULUS)))
WORD_ID = {word: index for index, word in enumerate(WORDS)}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

Fact = tuple[int, int]  # (value, multiplier); its truth is value * multiplier mod MODULUS
Result = Callable[[int, int], int]


@dataclass(frozen=True, order=True)
class Problem:
    """`start * multiplier < bound :`, to be solved by repeated multiplication modulo `MODULUS`."""

    start: int
    multiplier: int
    bound: int

    @property
    def prompt(self) -> str:
        """The text of the user's message."""
        return f"{self.start} * {self.multiplier} < {self.bound} :"

    @property
    def answer(self) -> str:
        """The first value below the bound."""
        return clean_trace(self)[-2]


@dataclass(frozen=True)
class Trace:
    """A response as words, and for each place the word a model should learn to write there.

    The two differ where a result slipped: the model reads the slip and learns what was meant.
    """

    words: tuple[str, ...]
    targets: tuple[str, ...]


def product(value: int, multiplier: int) -> int:
    """The true result of one step."""
    return value * multiplier % MODULUS


@cache
def orbit(value: int, multiplier: int) -> tuple[int, ...]:
    """`value` and all that follows it until it comes back."""
    values = [value]
    while (following := product(values[-1], multiplier)) != value:
        values.append(following)
    return tuple(values)


@cache
def multipliers() -> tuple[int, ...]:
    """All multipliers whose orbits have one of the lengths in `ORDERS`; of each pair of inverses the smaller one."""
    return tuple(a for a in range(2, MODULUS) if len(orbit(1, a)) in ORDERS and a < orbit(1, a)[-1])


@cache
def all_problems() -> tuple[Problem, ...]:
    """Every problem that ends and needs at least one step, in a fixed order."""
    return tuple(
        Problem(start, a, bound)
        for a in multipliers()
        for bound in BOUNDS
        for start in range(bound, MODULUS)
        if min(orbit(start, a)) < bound
    )


def split_problems(seed: int, eval_size: int) -> tuple[list[Problem], list[Problem]]:
    """(train, eval): disjoint, together all problems. Raises ValueError when one of them would be empty."""
    problems = list(all_problems())
    if not 0 < eval_size < len(problems):
        raise ValueError(f"eval_size is {eval_size}; give a number from 1 to {len(problems) - 1}")
    random.Random(f"split {seed}").shuffle(problems)
    return problems[eval_size:], problems[:eval_size]


def any_problem(rng: random.Random) -> Problem:
    """A problem from anywhere, most of them without an end: where a wrong product may lead."""
    bound = rng.choice(BOUNDS)
    return Problem(rng.randrange(bound, MODULUS), rng.choice(multipliers()), bound)


def prompt_words(problem: Problem) -> list[str]:
    """The prompt's tokens, as the chat template writes them."""
    return [USER, *problem.prompt.split(), ASSISTANT]


def encode(words: Iterable[str]) -> list[int]:
    """Token ids of words."""
    return [WORD_ID[word] for word in words]


def clean_trace(problem: Problem) -> tuple[str, ...]:
    """The right chain of thought, its answer and `<eos>`."""
    return _walk(problem, product, max_steps=MODULUS)


def off_path_trace(
    problem: Problem, rng: random.Random, slip_rate: float, max_steps: int, result: Result = product
) -> Trace:
    """A chain in which each result is, with probability `slip_rate`, replaced by any number.

    The model reads the slip and learns `result`. Without slips a chain that goes round would teach to copy the product
    written a round ago, not to compute it: a slip takes it to where it has not been.
    """
    targets: dict[int, str] = {}
    place = STEP_TOKENS - 2

    def slipping(value: int, multiplier: int) -> int:
        nonlocal place
        meant = result(value, multiplier)
        targets[place] = str(meant)
        place += STEP_TOKENS
        return rng.randrange(1, MODULUS) if rng.random() < slip_rate else meant

    words = _walk(problem, slipping, max_steps)
    return Trace(words, tuple(targets.get(index, word) for index, word in enumerate(words)))


def misconceptions(seed: int, share: float = 1 / 3) -> dict[Fact, int]:
    """The facts a student believes wrongly, each with its own wrong result: a fixed `share` of those problems use.

    Those facts lie on orbits that end. On all other orbits the student is as right as the teacher: whoever gets there
    meets no disagreement any more.
    """
    rng = random.Random(f"misconceptions {seed}")
    used = sorted({(problem.start, problem.multiplier) for problem in all_problems()})  # later steps start others
    return {fact: _wrong_result(fact, rng) for fact in rng.sample(used, round(share * len(used)))}


def noisy_trace(
    problem: Problem,
    rng: random.Random,
    wrong: dict[Fact, int],
    wrong_rate: float,
    slip_rate: float,
    max_steps: int,
) -> Trace:
    """An off-path trace that believes the facts in `wrong`: they come out wrong with probability `wrong_rate`."""

    def believed(value: int, multiplier: int) -> int:
        fact = (value, multiplier)
        return wrong[fact] if fact in wrong and rng.random() < wrong_rate else product(value, multiplier)

    return off_path_trace(problem, rng, slip_rate, max_steps, believed)


def answer_of(response: str) -> str | None:
    """The final answer of a decoded response; None if it never ended."""
    match = re.search(ANSWER_PATTERN, response)
    return match and match[1]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer with a chat template; ids are positions in `WORDS`. Needs transformers."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(WORD_ID, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL_WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,  # would glue "!" to the number before it
        model_max_length=MAX_TOKENS,
    )


def _walk(problem: Problem, result: Result, max_steps: int) -> tuple[str, ...]:
    """Writes steps with the given results until a value is below the bound, or `max_steps` are written."""
    words: list[str] = []
    value, a = problem.start, problem.multiplier
    for _ in range(max_steps):
        following = result(value, a)
        ended = following < problem.bound
        words += [str(value), "*", str(a), "=", str(following), "!" if ended else ";"]
        if ended:
            return (*words, str(following), EOS)
        value = following
    return tuple(words)


def _wrong_result(fact: Fact, rng: random.Random) -> int:
    """Any number but the right one that does not end a problem by accident."""
    while (number := rng.randrange(max(BOUNDS), MODULUS)) == product(*fact):
        pass
    return number
