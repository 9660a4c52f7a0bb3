"""Weights & Biases (offline) and MLflow (a local store): the real packages, read back by their own means, and a whole run, resumed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from watching import Seen, sample, wandb_records, watched
from whole_runs import records, train
from zoo import build_recipe

import katds.run
from katds.config import Recipe
from katds.errors import ConfigError
from katds.sections import WatchConfig
from katds.train.learner import Learner
from katds.train.writers import TRACKERS, Writer, check_trackers, open_writers
from katds.train.writers.mlflow import MlflowWriter
from katds.train.writers.wandb import WandbWriter

PARTS = ["kept ", "<script>", "`behind`"]


@pytest.fixture
def trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither needs a network. The folder of MLflow's store."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    return tmp_path / "store"


def mlflow_client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient()


def only_run(client: Any, experiment: str) -> Any:
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def history(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]


def test_mlflow_has_what_was_logged_and_a_resumed_run_goes_on(tmp_path: Path, trackers: Path) -> None:
    of = MlflowWriter("distillation", watched(tmp_path / "run", steps=4))
    of.scalars(0, {"eval/avg@8": 0.5})
    of.scalars(0, {"loss/total": 1.5, "time/learn/teacher writes": 0.25, "train/gradient_norm": math.inf})
    of.samples(1, [sample(PARTS, 1, 2)])
    of.close()
    client = mlflow_client()
    broken_off = only_run(client, "distillation")
    assert (broken_off.info.status, broken_off.info.run_name) == ("KILLED", "one")
    assert broken_off.data.params == {"run.name": "one", "stop.window": "64"}

    again = MlflowWriter("distillation", watched(tmp_path / "run", start=1, steps=4))
    assert only_run(client, "distillation").info.status == "RUNNING"
    again.scalars(1, {"loss/total": 1.25})
    again.summary({"steps": 4, "before": None})
    again.close()
    run = only_run(client, "distillation")
    assert run.info.run_id == broken_off.info.run_id and run.info.status == "FINISHED"
    assert history(client, run, "loss/total") == [(0, 1.5), (1, 1.25)]
    assert history(client, run, "eval/avg_at_8") == [(0, 0.5)] and "time/learn/teacher writes" in run.data.metrics
    for name, text in (("config.yaml", "run: {name: one}\nstop:\n  kind: kat\n"), ("summary.json", None)):
        file = Path(client.download_artifacts(run.info.run_id, name))
        assert text is None or file.read_text() == text
    assert json.loads(file.read_text()) == {"steps": 4, "before": None}
    page = Path(client.download_artifacts(run.info.run_id, "rollouts/step-000001.html")).read_text()
    assert shown(page) == ["p", *PARTS]


@pytest.mark.slow
def test_wandb_has_what_was_logged_and_a_resumed_run_goes_on(tmp_path: Path, trackers: Path) -> None:
    of = WandbWriter("distillation", watched(tmp_path / "run", steps=4))
    of.scalars(0, {"eval/avg@8": 0.5})
    of.scalars(0, {"loss/total": 1.5, "train/gradient_norm": math.nan})
    of.samples(1, [sample(PARTS, 1, 2)])
    of.close()
    again = WandbWriter("distillation", watched(tmp_path / "run", start=1, steps=4))
    again.scalars(1, {"loss/total": 1.25})
    again.summary({"steps": 4, "before": None, "after": {"avg@8": 0.75}})
    again.close()
    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    (begun,), (resumed,) = ([r.run for r in wandb_records(f) if r.HasField("run")] for f in (first, second))
    assert begun.run_id == resumed.run_id == json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert (begun.project, begun.display_name) == ("distillation", "one")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["run"] == {"name": "one"} and config["stop"] == {"window": 64}
    rows = logged(first)
    assert math.isnan(rows[1].pop("train/gradient_norm"))
    assert rows[:2] == [{"step": 0, "eval/avg@8": 0.5}, {"step": 0, "loss/total": 1.5}]
    assert [row["step"] for row in rows] == [0, 0, 1] and rows[2]["rollouts"]["_type"] == "html-file"
    page = (first / "files" / rows[2]["rollouts"]["path"]).read_text()
    assert shown(page) == ["p", *PARTS]
    assert logged(second) == [{"step": 1, "loss/total": 1.25}]
    assert summary(second) == {"steps": 4, "before": None, "after": {"avg@8": 0.75}}
    drawn = [r.metric for r in wandb_records(first) if r.HasField("metric")]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in drawn)


def shown(page: str) -> list[str]:
    """The blocks of a page that is a file: no server need say how it is encoded."""
    doctype, charset, rest = page.split("\n", 2)
    assert (doctype, charset) == ("<!DOCTYPE html>", '<meta charset="utf-8">')
    return [text for _, text in Seen(rest).blocks]


def logged(folder: Path) -> list[dict[str, Any]]:
    """What a W&B run has logged, without what W&B adds."""
    rows = [unfolded(r.history.item) for r in wandb_records(folder) if r.HasField("history")]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def summary(folder: Path) -> dict[str, Any]:
    """What a W&B run shows as its final summary."""
    items = [item for record in wandb_records(folder) for item in record.summary.update]
    return dict(unfolded(items)["final"])


def unfolded(items: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *sections, last = item.nested_key or [item.key]
        place = found
        for name in sections:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return found


def test_no_key_is_said_before_models_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"^watch\.wandb is mine, but there is no API key\. Run wandb login"):
        check_trackers(WatchConfig(wandb="mine"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(WatchConfig(wandb="mine"))


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:///x.db", "file:///proc/none"])
def test_a_server_that_is_not_there_is_said_at_once(
    tmp_path: Path, trackers: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=f"^watch.mlflow: mine cannot be opened with MLFLOW_TRACKING_URI {uri} "):
        open_writers(WatchConfig(mlflow="mine"), watched(tmp_path / "run"), print)
    assert not list((tmp_path / "run").iterdir()), "the folder stays free"


def test_a_store_that_goes_away_is_a_warning(tmp_path: Path, trackers: Path) -> None:
    said: list[str] = []
    writers = open_writers(WatchConfig(mlflow="mine"), watched(tmp_path / "run", steps=4), said.append)
    shutil.rmtree(trackers)
    trackers.write_text("no folder any more")
    for step in range(4):
        for of in writers:
            of.scalars(step, {"loss/total": 1.0})
    for of in writers:
        of.close()
    assert len(said) == 1 and said[0].startswith("warning: watch.mlflow failed (")
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1, 2, 3]


def refusal(recipe: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        katds.run.train(Recipe.model_validate(recipe))
    return str(refused.value)


def test_a_tracker_that_cannot_be_is_refused_on_all_ranks_before_models_are_loaded(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, "unseen", watch={"prometheus": str(tmp_path / "none")})
    for model in ("student", "teacher"):
        (tmp_path / model / "model.safetensors").write_bytes(b"no weights")
    messages = set(run_ranks(2, refusal, recipe))
    assert messages == {
        f"watch.prometheus: {tmp_path / 'none'} is no folder. Give the one that node_exporter reads "
        "(--collector.textfile.directory)."
    }
    assert not (tmp_path / "runs").exists()


def fails(recipe: dict[str, Any]) -> str:
    """The run, whose second update fails on all ranks."""
    update = Learner.update

    def broken(self: Learner, batch: Any, requests: Any, step: int) -> Any:
        if step == 1:
            raise ZeroDivisionError("in the middle")
        return update(self, batch, requests, step)

    Learner.update = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError) as failure:
        katds.run.train(Recipe.model_validate(recipe))
    return str(failure.value)


def test_a_run_that_fails_is_said_to_have_failed(tmp_path: Path, trackers: Path) -> None:
    """Or it would be shown as running for ever; resumed, it is the same run again, and comes to its end."""
    recipe = build_recipe(
        tmp_path, "fails", watch={"mlflow": "p"}, train={"steps": 2}, evaluation={"data": None}, checkpoint={"every": 1},
        run={"resume": "auto"},
    )  # fmt: skip
    assert run_ranks(2, fails, recipe) == ["in the middle"] * 2
    failed = only_run(mlflow_client(), "p")
    assert failed.info.status == "FAILED" and failed.data.metrics["loss/total"] > 0
    train(2, recipe)
    done = only_run(mlflow_client(), "p")
    assert (done.info.run_id, done.info.status) == (failed.info.run_id, "FINISHED")


def test_a_tracker_that_is_open_is_closed_where_another_cannot_be_opened(
    tmp_path: Path, trackers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(Writer):
        def __init__(self, value: Any, run: Any) -> None:
            raise ConfigError("watch.prometheus: no. Try again.")

    monkeypatch.setitem(TRACKERS, "prometheus", Refused)
    with pytest.raises(ConfigError, match="Try again"):
        open_writers(WatchConfig(mlflow="mine", prometheus=tmp_path), watched(tmp_path / "run"), print)
    assert only_run(mlflow_client(), "mine").info.status == "FAILED"


@pytest.mark.slow
def test_a_run_that_is_resumed_is_one_run_everywhere(tmp_path: Path, trackers: Path) -> None:
    recipe = build_recipe(tmp_path, "seen")
    (tmp_path / "prom").mkdir()
    recipe["watch"] = {"wandb": "p", "mlflow": "p", "prometheus": str(tmp_path / "prom")}
    train(2, recipe)
    folder = tmp_path / "runs" / "seen"
    for gone in ("final", "checkpoints/step-4"):
        shutil.rmtree(folder / gone)
    recipe["run"]["resume"] = True
    train(2, recipe)
    expected = [{key: value for key, value in record.items() if key != "step"} for record in records(folder)]
    steps = [record["step"] for record in records(folder)]
    client = mlflow_client()
    run = only_run(client, "p")
    assert run.info.status == "FINISHED"
    losses = {
        step: record["loss/total"] for step, record in zip(steps, expected, strict=True) if "loss/total" in record
    }
    assert dict(history(client, run, "loss/total")) == losses and len(losses) == 4
    assert run.data.params["stop.kind"] == "kat"
    assert {file.path for file in client.list_artifacts(run.info.run_id, "rollouts")} == {
        f"rollouts/step-00000{i}.html" for i in range(4)
    }
    rows = [row for f in sorted((folder / "wandb").glob("offline-run-*")) for row in logged(f) if "rollouts" not in row]
    merged: dict[int, dict[str, float]] = {}
    for row in rows:
        merged.setdefault(row.pop("step"), {}).update(row)
    for step, record in zip(steps, expected, strict=True):
        assert merged[step].items() >= record.items()
    assert "katds_step{" in (tmp_path / "prom" / "katds-seen.prom").read_text()
    assert 'katds_step{run="seen"} 4.0' in (tmp_path / "prom" / "katds-seen.prom").read_text()
