"""The page in a real browser: it draws everything, fetches nothing, runs nothing that a model wrote, and can be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import load, open_browser, prefer
from hand_made import make_run, sample, score_record, step_record, write
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from selenium.webdriver.support.wait import WebDriverWait
from test_report import ALL, HOSTILE
from whole_runs import full_run
from zoo import shared_folder

from katds.report.page import write_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


def page(folder: Path, *against: Path) -> Path:
    out = folder.parent / "page.html"
    write_page([folder, *against], [], out)
    return out


def run_script(browser: Any, body: str) -> Any:
    return browser.execute_script(f"return {body}")


SIZES = """Object.fromEntries([...document.querySelectorAll('.chart')].map((place, i) => {
    const plot = place.querySelector('svg.main-svg').getBoundingClientRect();
    const marks = place.querySelectorAll('.trace path, .points path, .hm image').length;
    return [place.id || 'sample-' + i, [plot.width, plot.height, marks]];
}))"""


def test_everything_is_drawn_and_nothing_fetched(browser: Any, tmp_path: Path) -> None:
    assert load(browser, page(make_run(tmp_path / "run"))) == []
    sizes = run_script(browser, SIZES)
    assert {f"chart-{name}" for name in ALL} <= sizes.keys()
    assert len(sizes) == len(ALL) + 3, "and a chart for each rollout of the step"
    for name, (width, height, marks) in sizes.items():
        assert width > 300 and height > 200 and marks > 0, (name, width, height, marks)
    assert run_script(browser, "performance.getEntriesByType('resource').map((entry) => entry.name)") == []


def test_a_real_run(browser: Any, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder, _ = full_run(shared_folder(tmp_path_factory), 2)
    write_page([folder], [], tmp_path / "page.html")
    assert load(browser, tmp_path / "page.html") == []
    said = json.loads((folder / "summary.json").read_text())
    tiles = dict(run_script(browser, "[...document.querySelectorAll('.tiles li')].map((li) => [...li.children].map((e) => e.textContent))"
                            ".map(([label, value]) => [label, value])"))  # fmt: skip
    assert tiles["avg@2"] == f"{said['before']['avg@2']:.3f} → {said['after']['avg@2']:.3f}"
    assert tiles["rollout tokens"] == str(said["rollout_tokens"]), "below a thousand"
    assert tiles["ended by the rule"] == f"{said['terminated_share']:.1%}"
    assert tiles["training time"].split()[1] in ("s", "min")
    rows = [json.loads(line) for line in (folder / "rollouts" / "step-000003.jsonl").read_text().splitlines()]
    choose(browser, 4)
    shown = run_script(browser, "[...document.querySelectorAll('#samples .words')].map((text) => "
                       "[...text.querySelectorAll('.token')].map((e) => e.textContent).join(''))")  # fmt: skip
    assert sorted(shown) == sorted(row["response"] for row in rows)


def choose(browser: Any, step: int) -> None:
    """As a reader does: by the selector."""
    Select(browser.find_element(By.ID, "step")).select_by_visible_text(str(step))


def test_a_step_is_chosen_and_its_rollouts_have_zones(browser: Any, tmp_path: Path) -> None:
    load(browser, page(make_run(tmp_path / "run")))
    heads = "[...document.querySelectorAll('#samples .badges b')].map((e) => e.textContent)"
    assert run_script(browser, heads) == ["Rollout 3001", "Rollout 3002", "Rollout 3000"], "the last step with a cut"
    choose(browser, 2)
    assert run_script(browser, heads) == ["Rollout 1001", "Rollout 1002", "Rollout 1000"]
    assert run_script(browser, "document.querySelectorAll('#samples svg.main-svg').length > 0")
    audit, ended = (
        run_script(browser, f"""[...document.querySelectorAll('#samples article')[{i}].querySelectorAll('.words .zone, .words .cut')]
            .map((zone) => [zone.className, zone.querySelectorAll('.token').length])""")
        for i in (0, 2)
    )  # fmt: skip
    assert audit == [["zone kept", 5], ["zone agreement", 4], ["cut", 0], ["zone beyond", 3]]
    assert ended == [["zone kept", 5], ["zone agreement", 4]]


def test_a_hole_is_marked_where_it_is(browser: Any, tmp_path: Path) -> None:
    """Kept, but not learnt from: `stop.supervise: after` cuts nothing."""
    run = make_run(tmp_path / "run", steps=1)
    rows = [sample(0, cut_at=None, kept=12, hole=[4, 9]), sample(1, cut_at=None, kept=12)]
    write(run / "rollouts" / "step-000000.jsonl", rows)
    load(browser, page(run))
    zones = """[...document.querySelectorAll('#samples article .words')].map((words) => [...words.querySelectorAll('.zone')]
        .map((zone) => [zone.className, zone.querySelectorAll('.token').length]))"""
    assert run_script(browser, zones) == [
        [["zone kept", 4], ["zone agreement", 5], ["zone kept", 3]],
        [["zone kept", 12]],
    ]


def test_tokens_are_shaded_by_their_divergence(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    kl = [0.0, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0]  # and none for the rest, as of an aligned teacher
    write(run / "rollouts" / "step-000000.jsonl", [sample(0, kl=kl)])
    load(browser, page(run))
    colours = run_script(
        browser, "[...document.querySelectorAll('.token')].map((e) => getComputedStyle(e).backgroundColor)"
    )
    alpha = [float(c.rpartition(",")[2].strip(" )")) if c.startswith("rgba") else 1.0 for c in colours]
    assert alpha == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0, 0, 0, 0, 0], abs=0.01), "as the legend says"
    titles = run_script(browser, "[...document.querySelectorAll('.token')].map((e) => e.title)")
    assert titles[3] == "token 4: 0.1 nats" and titles[11] == "token 12"


def test_what_a_model_wrote_does_nothing(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", student={"path": HOSTILE})
    named = run.rename(tmp_path / "<img src=x onerror=hacked=3> <b>run<")
    rows = [sample(0, prompt=HOSTILE, pieces=[HOSTILE] * 12, prefix=HOSTILE), sample(1, pieces=None, response=HOSTILE)]
    write(named / "rollouts" / "step-000003.jsonl", rows)
    write(named / "metrics.jsonl", [step_record(0) | {f"stop/{HOSTILE}": 0.5}, score_record(0, 0.5)])
    write(named / "timeline.jsonl", [{"step": 0, "ranks": {"0": [[HOSTILE, 0.0, 1.0]]}}])
    out = tmp_path / "page.html"
    write_page([named, make_run(tmp_path / "other")], [], out)
    assert load(browser, out) == []
    assert run_script(browser, "typeof hacked") == "undefined"
    assert (
        run_script(browser, "document.querySelectorAll('img, main b:not(.badges b), .words *:not(span)').length") == 0
    )
    assert run_script(browser, "document.querySelector('#samples .token').textContent") == HOSTILE
    assert run_script(browser, "document.querySelector('#samples .prompt').textContent") == HOSTILE + "\n"
    browser.execute_script(
        "Plotly.Fx.hover(document.querySelector('#samples .chart'), [{ curveNumber: 0, pointNumber: 0 }])"
    )
    label = WebDriverWait(browser, 30).until(
        lambda _: run_script(browser, "document.querySelector('#samples .hoverlayer').textContent")
    )
    assert "<img src=x" in label and "<b>" in label, label
    legend = "[...document.querySelectorAll('#chart-tokens .legendtext')].map((e) => e.textContent)"
    assert run_script(browser, legend) == ["<img src=x onerror=hacked=3> <b>run<", "other"]


def test_the_policy_stops_what_escapes(browser: Any, tmp_path: Path) -> None:
    """Were something of a model to become HTML after all, it could neither run nor fetch."""
    load(browser, page(make_run(tmp_path / "run")))
    browser.execute_script("""
        document.body.insertAdjacentHTML('beforeend', `<img src="http://localhost:1/x.png" onerror="hacked = 1">`);
        const script = document.createElement('script');
        script.textContent = 'hacked = 2';
        document.body.append(script);
    """)
    assert run_script(browser, "typeof hacked") == "undefined"
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert len(complaints) >= 2 and all("Content Security Policy" in message for message in complaints), complaints


def test_colours_follow_the_reader(browser: Any, tmp_path: Path) -> None:
    load(browser, page(make_run(tmp_path / "run")))
    seen = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('#chart-loss .xtick text')).fill]"
    light = run_script(browser, seen)
    prefer(browser, "dark")
    WebDriverWait(browser, 30).until(
        lambda _: run_script(browser, seen)[1] != light[1], "the charts keep their colours"
    )
    dark = run_script(browser, seen)
    assert _brightness(light[0]) > 240 > 60 > _brightness(dark[0])
    assert _brightness(dark[1]) - _brightness(dark[0]) > 90 < _brightness(light[0]) - _brightness(light[1]), (
        "legible on both"
    )


def _brightness(colour: str) -> float:
    return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")) / 3


def test_a_phone_has_no_sideways_scrolling(browser: Any, tmp_path: Path) -> None:
    against = make_run(tmp_path / "another-run-with-a-long-name-without-any-space-in-it")
    assert load(browser, page(make_run(tmp_path / "run"), against), width=360) == []
    assert run_script(browser, "document.documentElement.scrollWidth") == 360
    for name, (width, height, _) in run_script(browser, SIZES).items():
        assert 200 < width < 360 and height > 200, name


def test_charts_fit_on_paper(browser: Any, tmp_path: Path) -> None:
    load(browser, page(make_run(tmp_path / "run")), width=1600)
    widths = "[...document.querySelectorAll('.chart')].map((e) => e.querySelector('svg.main-svg').getBoundingClientRect().width)"
    before = run_script(browser, widths)
    browser.execute_script(f"addEventListener('beforeprint', () => {{ printed = {widths}; }})")
    assert len(browser.print_page()) > 10_000
    assert max(before) > 1000 and set(run_script(browser, "printed")) == {660}
    WebDriverWait(browser, 30).until(lambda _: run_script(browser, widths) == before, "the charts stay narrow")
