"""Rollouts as they are shown: pieces of text that are the text, and parts that are the rule's."""

from __future__ import annotations

import json
import random
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_zoo import KINDS, SCRIPTS, tokenizer
from watching import Seen

from katds.core.types import EOS, LENGTH, Cut, Prompt, Rollout, RolloutRequest
from katds.train.samples import describe, pieces
from katds.train.writers.page import page


def spelled(tokens: dict[int, bytes], ids: list[int]) -> str:
    return b"".join(tokens[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SCRIPTS)
def test_pieces_are_the_text_for_every_tokenizer(kind: str, text: str) -> None:
    ids = tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
    decode = tokenizer(kind).decode
    found = pieces(ids, decode(ids), decode)
    assert len(found) == len(ids) and "".join(found) == decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_text_of_whatever_a_model_writes(kind: str) -> None:
    """Characters that are never completed, bytes that are none, end tokens in the middle."""
    inner, rng = tokenizer(kind), random.Random(kind)
    for length in (0, 1, 2, 7, 40, 200):
        ids = [rng.randrange(len(inner)) for _ in range(length)]
        found = pieces(ids, inner.decode(ids), inner.decode)
        assert len(found) == length and "".join(found) == inner.decode(ids)


def test_a_character_is_of_the_token_that_completes_it() -> None:
    smile = "🙂".encode()
    tokens = {0: b"a", 1: smile[:2], 2: smile[2:] + b"b", 3: smile[:3]}
    decode = partial(spelled, tokens)
    assert pieces([0, 1, 2, 0], decode([0, 1, 2, 0]), decode) == ["a", "", "🙂b", "a"]
    assert pieces([0, 3], decode([0, 3]), decode) == ["a", "\ufffd"]  # never completed


def tidy(ids: list[int]) -> str:
    """A decoder that looks at the whole text, as some do about spaces before full stops."""
    return "".join("x ."[i % 3] if i < 6 else "yz" for i in ids).replace(" .", ".").replace("xyzx", "!").strip()


@given(st.lists(st.integers(0, 7), max_size=30))
def test_pieces_are_the_text_of_a_decoder_that_tidies_up(ids: list[int]) -> None:
    found = pieces(ids, tidy(ids), tidy)
    assert len(found) == len(ids) and "".join(found) == tidy(ids)


def test_parts_are_what_is_kept_what_is_agreed_on_and_what_lies_behind() -> None:
    def show(length: int, reason: str, cut: Cut | None, audit: bool = False) -> tuple[str, str, str]:
        request = RolloutRequest(1, Prompt(0, (8,)), 9, audit)
        kept = cut.kept if cut else length
        written = Rollout(request, list(range(length)), kept, reason, cut, [0.0] * length)
        return describe(written, lambda ids: "".join(map(str, ids))).parts

    assert show(5, EOS, None) == ("01234", "", "")
    assert show(6, "kat", Cut(2, 6, "kat")) == ("01", "2345", "")
    assert show(9, LENGTH, Cut(2, 6, "kat"), audit=True) == ("01", "2345", "678")
    assert show(9, LENGTH, Cut(0, 9, "kat"), audit=True) == ("", "012345678", "")


def test_a_hole_is_recorded_and_shown() -> None:
    """Of stop.supervise: after, where nothing is cut and the trap alone is not learnt from."""
    written = Rollout(RolloutRequest(1, Prompt(0, (8,)), 9), list(range(9)), 9, LENGTH, None, [0.5] * 9, hole=(3, 7))
    shown = describe(written, lambda ids: "".join(map(str, ids)))
    assert shown.around_hole == ("012", "3456", "78") and shown.parts == ("012345678", "", "")
    assert json.loads(shown.line())["hole"] == [3, 7]
    texts = [(tags[-1], text) for tags, text in Seen(page([shown])).blocks]
    assert texts == [("pre", "8"), ("strong", "012"), ("pre", "3456"), ("strong", "78")]
    written.hole = None
    whole = describe(written, lambda ids: "".join(map(str, ids)))
    assert "hole" not in json.loads(whole.line()) and whole.around_hole == ("012345678", "", "")
    assert [text for _, text in Seen(page([whole])).blocks] == ["8", "012345678"]


def test_only_a_rollout_with_an_end_of_its_own_is_graded() -> None:
    def right(length: int, reason: str, verdict: bool | None) -> bool | None:
        cut = Cut(1, length, "kat") if reason == "kat" else None
        written = Rollout(RolloutRequest(1, Prompt(0, (8,)), 9), [7] * length, 1, reason, cut)
        return describe(written, str, lambda of: verdict).right

    assert right(3, EOS, True) is True and right(3, LENGTH, False) is False
    assert right(3, EOS, None) is None and right(3, "kat", True) is None
