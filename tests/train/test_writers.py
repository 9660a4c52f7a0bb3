"""TensorBoard's tabs, the text file for Prometheus, and writers that fail: read back by TensorBoard and by Prometheus' own parser."""

from __future__ import annotations

import math
import random
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.plugin_util import markdown_to_safe_html
from watching import Seen, charts, events, pages, sample, watched

from katds.errors import ConfigError
from katds.sections import WatchConfig
from katds.train.samples import Sample
from katds.train.writers import TRACKERS, apart, check_trackers, folder_writers, open_writers
from katds.train.writers.apart import Apart
from katds.train.writers.base import MOST_PAGES, Writer
from katds.train.writers.page import MOST_CHARACTERS, page
from katds.train.writers.prometheus import PrometheusWriter, metric_name
from katds.train.writers.tensorboard import LAYOUT

# What models write, and what would be markup if it were let.
NASTY = (
    "<script>alert(1)</script>", "</pre>", "</strong>", "<!-- ", "| a | b |\n|---|---|\n", "```\ncode", "`x`", "**no**", "&lt;&amp;&",
    "\n\n\n", "    four spaces", "# heading\n", "[link](javascript:alert(1))", "$x_1 < y$", "<|im_end|>", "漢字🙂", "\u2028", "~~~\n",
    "<img src=x onerror=alert(1)>", "klzzwxh:0001", "\x02wzxhzdk:0\x03", "\x00\x1b[31m", "<pre>", "]]>", "<?php", "* * *\n", "> quote\n",
)  # fmt: skip


def shown(source: str) -> Seen:
    """As TensorBoard's text tab shows it."""
    return Seen(markdown_to_safe_html(source))


def pictured(text: str) -> str:
    """Text as a reader should find it again: control characters by their pictures; Markdown widens no tab here, as there is none."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c != "\n" else c for c in text)


@given(st.lists(st.sampled_from(NASTY), max_size=8), st.integers(0, 8), st.integers(0, 8), st.sampled_from(NASTY))
@example(list(NASTY[:8]), 2, 5, "<script>")
@example(["a\n", "~~~\n", "~~~\n", "```\ncode\n", "```\n"], 5, 5, "```\n```\n")  # fences of code
def test_text_is_shown_as_it_was_written_with_the_cut_in_it(texts: list[str], one: int, two: int, prompt: str) -> None:
    kept, at = sorted((min(one, len(texts)), min(two, len(texts))))
    seen = shown(page([sample(texts, kept, at, prompt)]))
    parts = [prompt, *("".join(part) for part in (texts[:kept], texts[kept:at], texts[at:]))]
    expected = [
        (("pre",), parts[0]),
        (("pre", "strong"), parts[1]),
        (("pre",), parts[2]),
        (("blockquote", "pre", "em"), parts[3]),
    ]
    expected = [(tags, pictured(text)) for i, (tags, text) in enumerate(expected) if text or i < 2]
    # A browser drops the newline that follows <pre>; Markdown drops those around the whole block.
    assert [text.strip() for _, text in seen.blocks] == [text.strip() for _, text in expected]
    assert [tags for tags, text in seen.blocks if text] == [tags for tags, text in expected if text]
    assert seen.tags <= {"h4", "p", "pre", "strong", "em", "blockquote"}


def test_a_page_names_the_rollouts_and_leaves_out_the_middle_of_long_ones() -> None:
    long = [f"{i:05d} " for i in range(3000)]
    source = page([sample(long, 1000, 1200, i=3), sample(["a"], 1, None, i=9)])
    seen = shown(source)
    texts = [text for _, text in seen.blocks]
    assert len(texts) == 6 and all(len(text) < MOST_CHARACTERS + 60 for text in texts)
    assert texts[1].startswith("00000 ") and texts[1].endswith("00999 ") and "[... 4000 characters ...]" in texts[1]
    assert texts[3].startswith("01200 ") and texts[3].endswith("02999 ")
    assert (
        "rollout 3 (audit): ended by length, right" in source
        and "rollout 9" in source
        and "kept: 1000 of 3000 tokens" in source
    )


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 45, 400, 1001])
def test_pages_are_few_and_the_last_step_has_one(tmp_path: Path, steps: int) -> None:
    run = watched(tmp_path, steps=steps)
    chosen = [step for step in range(steps) if run.has_page(step)]
    assert min(steps, MOST_PAGES / 2) <= len(chosen) <= MOST_PAGES and chosen[-1] == steps - 1


def test_event_files_stay_small(tmp_path: Path) -> None:
    """The default of 4 rollouts a step, 4096 tokens each of five characters."""
    of = folder_writers(watched(tmp_path, steps=40))[1]
    long = sample([f"{i:04d} " for i in range(4096)], 1000, 1200)
    for step in range(40):
        of.samples(step, [long] * 4)
    of.close()
    assert sorted(pages(tmp_path)) == list(range(3, 40, 4))
    (file,) = tmp_path.glob("events.out.tfevents*")
    assert file.stat().st_size < 10 * 40_000


def play(run_folder: Path, start: int, end: int, tags: tuple[str, ...] = ("loss/total",), steps: int = 20) -> None:
    writers = folder_writers(watched(run_folder, start, steps))
    for step in range(start, end):
        for of in writers:
            of.scalars(step, dict.fromkeys(tags, float(step)))
            of.samples(step, [sample([f"from {start}"], 1, None)])
    for of in writers:
        of.close()


def test_a_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
    play(tmp_path, 0, 15)
    play(tmp_path, 6, 20)
    read = events(tmp_path)
    assert [e.step for e in read.Scalars("loss/total")] == list(range(20))
    texts = pages(tmp_path)
    assert list(texts) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    assert all(("from 6" in text) == (step >= 6) for step, text in texts.items())
    recipes = [e.tensor_proto.string_val[0].decode() for e in read.Tensors("recipe/text_summary")]
    assert shown(recipes[-1]).blocks == [(("pre", "code"), "run: {name: one}\nstop:\n  kind: kat\n")]


def test_a_resumed_run_has_no_rollouts_of_steps_it_has_not_made_again(tmp_path: Path) -> None:
    play(tmp_path, 0, 15)
    mine = tmp_path / "rollouts" / "step-best.jsonl"
    mine.write_text("{}")
    play(tmp_path, 6, 8)
    files = sorted(tmp_path.glob("rollouts/step-0*.jsonl"))
    assert [int(file.stem.removeprefix("step-")) for file in files] == list(range(8)) and mine.exists()
    assert all(("from 6" in file.read_text()) == (step >= 6) for step, file in enumerate(files))


TAGS = (
    "loss/total", "loss/kl", "loss/entropy", "train/lr", "train/gradient_norm", "train/tokens", "rollout/length_mean", "rollout/kept_mean",
    "rollout/saved_fraction", "rollout/saved_fraction_total", "rollout/terminated_fraction", "rollout/kl_mean", "kat/threshold",
    "kat/threshold/1", "kat/min_window", "kat/entries", "kat/false_terminations", "stop/eos", "stop/kat", "time/rollout",
    "time/rollout/decode", "time/learn", "time/learn/forward", "time/evaluation/rollout", "throughput/rollout_tokens_per_second",
    "memory/peak_bytes", "eval/avg@8", "eval/pass@4", "eval/avg@8_low", "eval/aime/avg@8", "eval/average/pass@k_high", "eval/length_mean",
    "eval/aime/finished", "rollout/prefix_mean", "mine/own", "repetition/x",
)  # fmt: skip


def test_every_tag_is_in_one_chart_of_the_layout(tmp_path: Path) -> None:
    play(tmp_path, 0, 3, TAGS)
    play(tmp_path, 2, 4, TAGS)
    found = charts(tmp_path)
    assert {category: list(of) for category, of in found.items()} == {
        category: list(of) for category, of in LAYOUT.items()
    }
    drawn = [tag for category in found.values() for tags in category.values() for tag in tags]
    assert sorted(drawn) == sorted(TAGS)
    assert found["stop rule"] == {
        "threshold and window minima [nats]": ["kat/min_window", "kat/threshold", "kat/threshold/1"],
        "why rollouts ended [share]": ["stop/eos", "stop/kat"],
        "all else that rule and objective say": ["kat/entries", "mine/own", "repetition/x"],
    }
    assert found["accuracy"]["avg@ and pass@"] == ["eval/aime/avg@8", "eval/avg@8", "eval/pass@4"]


def exposed(folder: Path, name: str = "one") -> dict[tuple[str, str], float]:
    """(metric, its label besides the run) -> value, by Prometheus' own parser."""
    found = {}
    for family in text_string_to_metric_families((folder / f"katds-{name}.prom").read_text()):
        assert family.type == "gauge" and family.documentation
        for each in family.samples:
            labels = dict(each.labels)
            assert labels.pop("run") == name and len(labels) < 2
            found[each.name, "".join(labels.values())] = each.value
    return found


def test_prometheus_reads_the_newest_step(tmp_path: Path) -> None:
    of = PrometheusWriter(tmp_path, watched(tmp_path / "run"))
    of.scalars(0, {"eval/avg@8": 0.125, "eval/a-b/avg@8": 0.25})
    of.scalars(0, {"rollout/saved_fraction": 0.5, "stop/kat": 0.25, "time/rollout/decode": 1.5, "loss/total": math.nan})
    first = exposed(tmp_path)
    written = first.pop(("katds_written_timestamp_seconds", ""))
    assert abs(written - time.time()) < 60 and math.isnan(first.pop(("katds_loss_total", "")))
    assert first == {
        ("katds_step", ""): 1, ("katds_steps", ""): 20, ("katds_finished", ""): 0,
        ("katds_rollout_saved_fraction", ""): 0.5, ("katds_stop_share", "kat"): 0.25,
        ("katds_phase_seconds", "rollout/decode"): 1.5, ("katds_evaluation", "avg@8"): 0.125, ("katds_evaluation", "a-b/avg@8"): 0.25,
    }  # fmt: skip
    of.scalars(1, {"stop/eos": 1.0})
    second = exposed(tmp_path)
    assert (
        second["katds_step", ""] == 2
        and ("katds_stop_share", "eos") in second
        and ("katds_evaluation", "avg@8") in second
    )
    assert ("katds_rollout_saved_fraction", "") not in second, "what this step did not have is not the last one's"
    of.scalars(2, {"eval/avg@8": 0.5})  # the last, which no step follows
    of.summary({})
    third = exposed(tmp_path)
    assert (third["katds_evaluation", "avg@8"], third["katds_step", ""], third["katds_finished", ""]) == (0.5, 2, 1)
    assert ("katds_stop_share", "eos") in third and ("katds_evaluation", "a-b/avg@8") not in third
    PrometheusWriter(tmp_path, watched(tmp_path / "run", name="two")).scalars(4, {"loss/total": 1.0})
    assert exposed(tmp_path, "two")["katds_step", ""] == 5
    assert sorted(path.name for path in tmp_path.glob("*")) == ["katds-one.prom", "katds-two.prom", "run"]


def test_a_scrape_never_reads_half_a_file(tmp_path: Path) -> None:
    of = PrometheusWriter(tmp_path, watched(tmp_path / "run"))
    tags = {f"rollout/number_{i}": float(i) for i in range(100)}
    of.scalars(0, tags)
    ended = threading.Event()

    def write() -> None:
        for step in range(1, 12):
            of.scalars(step, tags)
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not ended.is_set():
        assert len(exposed(tmp_path)) == 104
    thread.join()


@given(st.text(max_size=30))
def test_metric_names_are_legal(tag: str) -> None:
    from prometheus_client import Gauge

    Gauge(metric_name(tag), "any", registry=None)


class Shown(Sample):
    """One that can be watched: `Sample` has slots."""


class Failing(Writer):
    """Fails at some steps, and answers slowly if it is told to."""

    def __init__(self, fails: set[int], wait: float = 0.0) -> None:
        self.got: list[int] = []
        self.closed = False
        self._fails, self._wait = fails, wait

    def scalars(self, step: int, record: object) -> None:
        time.sleep(self._wait)
        if step in self._fails:
            raise ConnectionError(f"no route to host. Step {step}")
        self.got.append(step)

    def close(self, failed: bool = False) -> None:
        self.closed = True


def test_a_tracker_that_fails_is_one_warning_and_gets_what_follows(tmp_path: Path) -> None:
    said: list[str] = []
    inner = Failing({2, 3})
    of = Apart("watch.mlflow", inner, watched(tmp_path), said.append)
    for step in range(6):
        of.scalars(step, {})
    of.close()
    assert inner.got == [0, 1, 4, 5] and inner.closed
    assert said == [
        "warning: watch.mlflow failed (ConnectionError: no route to host); training goes on, the run folder has everything"
    ]


def test_training_does_not_wait_for_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "MOST_WAITING", 5)
    monkeypatch.setattr(apart, "PATIENCE_SECONDS", 0.2)
    said: list[str] = []
    inner = Failing(set(), wait=0.5)
    of = Apart("watch.wandb", inner, watched(tmp_path), said.append)
    began = time.perf_counter()
    for step in range(50):
        of.scalars(step, {})
    assert time.perf_counter() - began < 5
    of.close()
    assert time.perf_counter() - began < 10  # 25 s if it waited
    assert len(said) == 1 and "does not keep up, 5 records wait" in said[0]


def test_what_is_handed_over_may_change_afterwards(tmp_path: Path) -> None:
    records: list[dict[str, float]] = []

    class Slow(Writer):
        def scalars(self, step: int, record: object) -> None:
            time.sleep(0.05)
            records.append(dict(record))  # type: ignore[call-overload]

    of, record = Apart("watch.x", Slow(), watched(tmp_path), print), {"a": 1.0}
    of.scalars(0, record)
    record["a"] = 2.0
    of.close()
    assert records == [{"a": 1.0}]


def test_a_tracker_that_hangs_holds_only_the_rollouts_of_pages(tmp_path: Path) -> None:
    answers = threading.Event()
    got: list[int] = []

    class Hanging(Writer):
        def samples(self, step: int, samples: Sequence[Sample]) -> None:
            answers.wait(30)
            got.append(step)

    of = Apart("watch.x", Hanging(), watched(tmp_path, steps=40), print)
    held: list[weakref.ref[Sample]] = []
    for step in range(40):
        one = Shown(**asdict(sample(["a"], 1, None)))
        held.append(weakref.ref(one))
        of.samples(step, [one])
        del one
    assert [step for step, each in enumerate(held) if each() is not None] == list(range(3, 40, 4))
    answers.set()
    of.close()
    assert got == list(range(3, 40, 4))


def test_every_tracker_has_its_setting() -> None:
    assert list(TRACKERS) == list(WatchConfig.model_fields)


@pytest.mark.parametrize(
    ("name", "module"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("prometheus", "prometheus_client")]
)
def test_a_missing_package_is_said_with_the_command(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    with pytest.raises(ConfigError, match=rf"^watch.{name} is x, but .* Run pip install 'katds\[{name}\]'\.$"):
        check_trackers(WatchConfig.model_validate({name: "x"}))
    check_trackers(WatchConfig())


def test_prometheus_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        check_trackers(WatchConfig(prometheus=tmp_path / "none"))


def test_a_tracker_is_opened_only_where_asked(tmp_path: Path) -> None:
    (tmp_path / "prom").mkdir()
    assert len(open_writers(WatchConfig(), watched(tmp_path / "one"), print)) == 2
    writers = open_writers(WatchConfig(prometheus=tmp_path / "prom"), watched(tmp_path / "two"), print)
    order = random.Random(0).sample(range(5), 5)
    for of in writers:
        of.scalars(order[0], {"loss/total": 1.0})
        of.close()
    assert len(writers) == 3 and exposed(tmp_path / "prom")["katds_step", ""] == order[0] + 1
