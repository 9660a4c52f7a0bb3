"""`bench phases`: its numbers by hand, and a clock that waits for the device where it is asked to."""

from __future__ import annotations

import argparse

import pytest
import torch

from katds.bench import phases
from katds.bench.arguments import default_ranks, positive
from katds.train.clock import Clock

LAST = {
    "time/rollout/prefill": 1.0, "time/rollout/decode": 2.0, "time/rollout/teacher": 3.0, "time/rollout/judge": 0.5,
    "time/rollout/control": 4.0, "time/learn/pack": 0.25, "time/learn/optimizer": 1.25, "time/learn/forward": 5.0,
    "time/learn/backward": 6.0,
}  # fmt: skip


def test_waiting_is_what_the_reductions_take_beyond_their_own_time() -> None:
    seconds = phases._phases(LAST, 30.0, punctual=1.5)
    assert seconds == {
        "prefill": 1.0, "decode": 2.0, "teacher": 3.0, "judge": 0.5, "pack": 0.25, "update": 1.25, "learn": 11.0,
        "sync": 1.5, "idle": 2.5, "other": 7.0, "step": 30.0,
    }  # fmt: skip
    assert sum(seconds.values()) == 2 * 30.0, "the phases add up to the step"
    slow = phases._phases(LAST, 30.0, punctual=9.0)
    assert (slow["sync"], slow["idle"], slow["other"]) == (4.0, 0.0, 7.0)


def test_rows_are_medians_and_their_floors() -> None:
    steps = [phases._phases(LAST | {"time/rollout/decode": decode}, 30.0, 1.5) for decode in (2.0, 8.0, 3.0)]
    measured = {
        "steps": steps, "floors": {"decode": 1.5, "teacher": 0.0}, "attention": {"decode": 0.25}, "displaced": {"decode": 0.5},
        "keys": {"decode": 0.125}, "sdpa": {"decode": 0.75},
    }  # fmt: skip
    rows = {row["phase"]: row for row in phases._rows("x", measured)}
    assert rows["decode"] == {
        "shape": "x", "phase": "decode", "seconds": 3.0, "share": "10%", "floor": 1.5, "x floor": "2.00",
        "attention": 0.25, "displaced": 0.5, "rest": 0.75, "keys": 0.125, "sdpa": 0.75,
    }  # fmt: skip
    assert rows["judge"]["attention"] is None and rows["judge"]["rest"] is None
    assert rows["teacher"]["x floor"] is None and rows["learn"]["floor"] is None
    assert list(rows) == [*phases.PHASES, "learn", "sync", "idle", "other", "step"]


@pytest.mark.parametrize(("exact", "waits"), [(False, [1, 1, 1, 2]), (True, [1, 2, 3, 4])])
def test_an_exact_clock_waits_for_the_device_around_every_phase(
    exact: bool, waits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`waits`: synchronisations so far when each phase has begun and when it is over."""
    synchronised: list[None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronised.append(None))
    clock, seen = Clock(), []
    clock.exact = exact
    with clock("rollout"):
        seen.append(len(synchronised))
        with clock("decode"):
            seen.append(len(synchronised))
        seen.append(len(synchronised))
    seen.append(len(synchronised))
    assert seen == waits


@pytest.mark.parametrize("exact", [False, True])
def test_without_a_device_no_clock_waits(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("there is no device"))
    clock = Clock()
    clock.exact = exact
    with clock("rollout"), clock("decode"):
        pass
    assert clock.take().keys() == {"rollout", "rollout/decode"}


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1.5", "²"])
def test_numbers_below_one_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 1"):
        positive(text)
    assert positive("17") == 17


@pytest.mark.parametrize("option", ["--steps", "--ranks", "--chunk"])
def test_the_command_line_refuses_them(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    phases.options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([option, "0"])
    assert f"{option}: '0' is not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_as_many_ranks_as_there_are_gpus_but_two(gpus: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert default_ranks() == ranks
