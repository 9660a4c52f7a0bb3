"""Where two tokenisations of one text meet, and what teacher and student say between two such places.

Source: cross-tokenizer on-policy distillation (arXiv 2606.09456). Tokens are known by the text that they add, so any two tokenizers
can be compared.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from unicodedata import normalize

LONGEST_CHUNK = 6  # tokens on a side; longer chunks get no advantage (published)
LARGEST_ADVANTAGE = 10.0  # published; here it bounds the exponent of the divergence as well


class TextChunk(NamedTuple):
    """Neighbouring tokens of both sides. `same`: they say the same, up to NFC, and no part of them does."""

    student: int  # tokens
    teacher: int
    same: bool

    @property
    def teaches(self) -> bool:
        """Whether its tokens get an advantage."""
        return self.same and max(self.student, self.teacher) <= LONGEST_CHUNK


class Aligner:
    """Two token streams in step: gives out chunks as soon as both sides have reached the same text.

    Two pointers: the side that has said less goes on, until both have said the same. Lengths are those of canonical
    decompositions (NFD), which add up; whether texts are equal is asked where their lengths are. Texts are equal in NFC if and
    only if they are in NFD.

    Invariants: the chunks do not depend on how the tokens are split into calls. With student and teacher exchanged they are
    the same, exchanged. Each token is in one chunk, in order; one without text (it ends inside a character) is in that of the
    next character.

    Cost: O(1) per token and O(characters) per chunk, as long as the texts are equal; where they are not, chunks end at `close`.
    """

    __slots__ = ("_student", "_teacher")

    def __init__(self) -> None:
        self._student, self._teacher = _Side(), _Side()

    def feed(self, student: Iterable[str], teacher: Iterable[str]) -> list[TextChunk]:
        """The texts of the next tokens of both sides; returns the chunks that are complete."""
        self._student.waiting.extend(student)
        self._teacher.waiting.extend(teacher)
        return list(self._meet())

    def close(self) -> list[TextChunk]:
        """Both texts end here, whether they are equal or not: what is left of them becomes a chunk, of one side alone if need be."""
        for side in (self._student, self._teacher):
            while side.waiting:
                side.take()
        return [self._cut(same=False)] if self._student.taken or self._teacher.taken else []

    def _meet(self) -> Iterator[TextChunk]:
        one, two = self._student, self._teacher
        while True:
            if one.length == two.length:
                if one.length and one.text == two.text:
                    yield self._cut(same=True)
                    continue
                behind = one if one.waiting else two
            else:
                behind = one if one.length < two.length else two
            if not behind.waiting:
                return
            behind.take()

    def _cut(self, same: bool) -> TextChunk:
        return TextChunk(self._student.clear(), self._teacher.clear(), same)


class _Side:
    """One token stream since the last chunk."""

    __slots__ = ("length", "taken", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[str] = deque()
        self.taken: list[str] = []
        self.length = 0  # code points of the decomposition of what is taken

    @property
    def text(self) -> str:
        return normalize("NFC", "".join(self.taken))

    def take(self) -> None:
        piece = self.waiting.popleft()
        self.taken.append(piece)
        self.length += len(piece) if piece.isascii() else len(normalize("NFD", piece))

    def clear(self) -> int:
        count = len(self.taken)
        self.taken, self.length = [], 0
        return count


def chunk_divergence(teacher: float, student: float) -> float:
    """k3 = exp(r) - 1 - r with r = L_T - L_S, at most 10: what a stop rule sees of a chunk. At least 0 [nats]; 0 where both agree exactly.

    Where a chunk has one token on each side, its mean over y ~ p is KL(p || q) (k3, Schulman 2020) but for the bound. Over longer
    chunks it is that up to the mass that the teacher gives to other tokenisations of the same text.

    Which divergence a stop rule should see across tokenizers is open in the paper; there is no distribution over a shared
    vocabulary to compare. Chosen: k3 and not k1 = -r, which has the same mean but either sign: a window of tokens that the teacher
    likes better than the student would count as low, and disagreement of both signs would cancel. A chunk that is too long to teach
    counts as any other: what the teacher thinks of the text is known, only not of which token.
    """
    ratio = min(teacher - student, LARGEST_ADVANTAGE)
    return math.expm1(ratio) - ratio


# Per token of a chunk that the teacher has no tokens for, or those of another text [nats]: as if it had given the text the lowest
# likelihood within the bound. With 0, which is agreement, a detector of agreement would stop just what nothing is known about.
UNSAID_DIVERGENCE = chunk_divergence(-LARGEST_ADVANTAGE, 0.0)


class Reading(NamedTuple):
    """What the next tokens of a rollout are to a teacher with another tokenizer."""

    teacher_ids: list[int]  # that are sure now; all that follows comes after them
    chunks: list[TextChunk]  # complete now, in order
    full: bool = False  # the teacher's context holds no more: the rollout ends with these chunks
    end_ids: tuple[int, ...] = ()  # the response has ended, and the last of `teacher_ids` stands for any of these
