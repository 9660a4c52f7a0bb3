"""A rollout as a reader sees it: its text token by token, how far the rule kept it, and whether it was right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from katds.core.types import Rollout
from katds.data.text_stream import TextStream

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of `rollouts/step-*.jsonl`.

    `pieces` and `kl` (nats) have one entry per token of the response; the pieces, joined, are `response`. `right` is None where there is
    no answer to compare with, or the rule ended the rollout before it had one.
    """

    id: int
    prompt: str
    prefix: str  # by the teacher, between prompt and response
    response: str
    pieces: list[str]
    reason: str
    right: bool | None
    audit: bool
    tokens: int
    kept: int
    cut_at: int | None
    kl: list[float]
    hole: tuple[int, int] | None = None  # response tokens [from, to) that are kept, but not learnt from

    @property
    def parts(self) -> tuple[str, str, str]:
        """The response up to the kept point; from there to where the cut was known, the stretch of agreement; and what lies behind it,
        which only audit rollouts have."""
        at = self.tokens if self.cut_at is None else self.cut_at
        kept, agreed, behind = self.pieces[: self.kept], self.pieces[self.kept : at], self.pieces[at:]
        return "".join(kept), "".join(agreed), "".join(behind)

    @property
    def around_hole(self) -> tuple[str, str, str]:
        """What is kept: before the hole, in it, and after it. Without a hole all is before it."""
        begin, end = self.hole or (self.kept, self.kept)
        kept = self.pieces[: self.kept]
        return "".join(kept[:begin]), "".join(kept[begin:end]), "".join(kept[end:])

    def line(self) -> str:
        record = asdict(self)
        if not self.prefix:
            del record["prefix"]
        if self.hole is None:
            del record["hole"]
        return json.dumps(record) + "\n"


def describe(rollout: Rollout, decode: Decode, correct: Callable[[Rollout], bool | None] | None = None) -> Sample:
    """`decode` turns token ids into text, special tokens included; `correct` grades a complete rollout.

    Cost: some 5 us per token, and a grading.
    """
    response = decode(list(rollout.response_ids))
    return Sample(
        id=rollout.id,
        prompt=decode(list(rollout.request.prompt.token_ids)),
        prefix=decode(list(rollout.prefix)) if rollout.prefix else "",
        response=response,
        pieces=pieces(rollout.response_ids, response, decode),
        reason=rollout.reason,
        right=correct(rollout) if correct is not None and not rollout.terminated else None,
        audit=rollout.request.audit,
        tokens=len(rollout.response_ids),
        kept=rollout.kept,
        cut_at=rollout.cut.at if rollout.cut else None,
        kl=[round(d, 5) for d in rollout.divergences],
        hole=rollout.hole,
    )


def pieces(ids: Sequence[int], text: str, decode: Decode) -> list[str]:
    """What each token adds to `text`, the text of all; a character goes to the token that completes it. Joined, they are `text`."""
    if not ids:
        return []
    stream = TextStream(decode, [])
    found = [stream.step(token) for token in ids]
    found[-1] += stream.rest()
    return found if "".join(found) == text else _settled(found, text)


def _settled(found: Sequence[str], text: str) -> list[str]:
    """Where the tokens read otherwise one by one than all at once (a decoder that tidies up spaces, say), the stretch in between is its
    first token's."""
    joined = "".join(found)
    head = _shared(joined, text)
    tail = min(_shared(joined[::-1], text[::-1]), len(joined) - head, len(text) - head)
    settled: list[str] = []
    at, spoken = 0, False
    for piece in found:
        begin, at = at, at + len(piece)
        before, behind = joined[begin : min(at, head)], joined[max(begin, len(joined) - tail) : at]
        between = ""
        if not spoken and (at > head or at == len(joined)):
            between, spoken = text[head : len(text) - tail], True
        settled.append(before + between + behind)
    return settled


def _shared(one: str, two: str) -> int:
    """Characters of the longest common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
