"""Recipes, flags, help and messages of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from messages import refused

from katds.cli import dump_recipe, load_recipe, run_main
from katds.config import Recipe
from katds.core.stop.kat_settings import KatSettings
from katds.core.stop.simple import NeverSettings, PrefixSettings
from katds.errors import ConfigError
from katds.schema import leaves
from katds.sections import MatchGraderConfig

REQUIRED = ["--run.name", "demo", "--student.path", "s", "--teacher.path", "t", "--data.train", "d.jsonl"]
YAML = """\
run: {name: demo}
student: {path: s}
teacher: {path: t}
data: {train: d.jsonl}
"""


def load(*flags: str) -> Recipe:
    return load_recipe([*REQUIRED, *flags], "launch/train.py", "Train.")


def from_file(path: Path, text: str, *flags: str) -> Recipe:
    path.write_text(YAML + text)
    return load_recipe(["--config", str(path), *flags], "launch/train.py", "Train.")


def test_order_is_defaults_recipe_flags(tmp_path: Path) -> None:
    text = "stop: {window: 32, persistence: 2}\nrollout: {slots: 3}\n"
    recipe = from_file(tmp_path / "r.yaml", text, "--stop.window=48", "--rollout.top_k", "7")
    assert isinstance(recipe.stop, KatSettings)
    assert (recipe.stop.window, recipe.stop.persistence, recipe.stop.threshold.eta) == (48, 2, 0.3)
    assert (recipe.rollout.slots, recipe.rollout.top_k, recipe.rollout.max_new_tokens) == (3, 7, 4096)


@pytest.mark.parametrize("flag", [["--run.resume"], ["--run.resume=true"], ["--run.resume", "true"]])
def test_boolean_flags(flag: list[str]) -> None:
    assert load(*flag, "--checkpoint.every", "3").run.resume is True
    assert load(*flag, "--run.resume", "false").run.resume is False  # the last one wins
    assert load(*flag, "--run.resume", "auto").run.resume == "auto"


def test_values_are_yaml_but_text_stays_as_typed() -> None:
    recipe = load(
        "--train.optimizer.gradient_clip", "null", "--train.optimizer.betas", "[0.8, 0.95]",
        "--train.optimizer.lr", "1e-5", "--evaluation.grader.kind", "match",
        "--evaluation.grader.pattern", "[({]x: (.*)", "--run.name", "2024-01-02", "--data.answer_column", "null",
        "--data.template_options.enable_thinking", "false", "--data.train", "007",
    )  # fmt: skip
    assert recipe.train.optimizer.gradient_clip is None and recipe.train.optimizer.lr == 1e-5
    assert recipe.train.optimizer.betas == (0.8, 0.95)
    assert isinstance(recipe.evaluation.grader, MatchGraderConfig)
    assert recipe.evaluation.grader.pattern == "[({]x: (.*)"
    assert recipe.run.name == "2024-01-02" and recipe.data.answer_column is None
    assert recipe.data.template_options == {"enable_thinking": False} and recipe.data.train == Path("007")


def test_a_date_in_a_file_stays_text(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(YAML)
    (tmp_path / "r.yaml").write_text("extends: base.yaml\nrun: {name: 2024-01-02}\n")
    assert load_recipe(["--config", str(tmp_path / "r.yaml")], "p", "d").run.name == "2024-01-02"


def test_launcher_flags_are_ignored() -> None:
    assert load("--local_rank=3") == load() == load("--local-rank", "1")


def test_another_kind_drops_the_recipes_keys(tmp_path: Path) -> None:
    text = "stop: {kind: kat, window: 32}\nevaluation: {grader: {kind: match, pattern: '(x)'}}\n"
    recipe = from_file(tmp_path / "r.yaml", text, "--stop.kind", "never", "--evaluation.grader.kind", "math")
    assert isinstance(recipe.stop, NeverSettings) and recipe.evaluation.grader.kind == "math"
    same = from_file(tmp_path / "r.yaml", text, "--stop.kind", "kat")
    assert isinstance(same.stop, KatSettings) and same.stop.window == 32
    prefix = from_file(tmp_path / "r.yaml", text, "--stop.tokens", "9", "--stop.kind", "prefix")
    assert isinstance(prefix.stop, PrefixSettings) and prefix.stop.tokens == 9
    refused(
        lambda: from_file(tmp_path / "r.yaml", text, "--stop.kind", "never", "--stop.window", "8"),
        "stop.window is not a setting", "belongs to stop.kind kat, not to never",
    )  # fmt: skip


def test_extends_merges_and_is_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(YAML + "stop: {window: 32, persistence: 3}\nrollout: {slots: 2}\n")
    (tmp_path / "mid.yaml").write_text("extends: base.yaml\nstop: {window: 40}\n")
    (tmp_path / "sub/top.yaml").write_text("extends: ../mid.yaml\nstop: {persistence: 7}\n")
    recipe = load_recipe(["--config", str(tmp_path / "sub/top.yaml")], "p", "d")
    assert isinstance(recipe.stop, KatSettings)
    assert (recipe.stop.window, recipe.stop.persistence, recipe.rollout.slots) == (40, 7, 2)


def test_extends_in_a_circle_and_into_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    refused(lambda: load_recipe(["--config", str(tmp_path / "a.yaml")], "p", "d"), "circle", "a.yaml", "b.yaml")
    (tmp_path / "b.yaml").write_text("extends: missing.yaml\n")
    refused(lambda: load_recipe(["--config", str(tmp_path / "a.yaml")], "p", "d"), "missing.yaml", "no such file")


VARIANTS = [
    [],
    ["--stop.kind", "random", "--stop.max_tokens", "77", "--objective.kind", "jsd", "--objective.beta", "0.1"],
    ["--train.optimizer.lr", "3e-7", "--train.epochs", "0.125", "--train.optimizer.betas", "[0.1, 0.2]"],
    ["--evaluation.grader.kind", "match", "--evaluation.grader.pattern", "null: [#'\"\\d](x)\n", "--run.name", "1e3"],
    ["--stop.kind", "first_of", "--stop.rules", "[{kind: kat, window: 9}, {kind: replay, run: runs/x}]"],
    ["--data.template_options", "{a: '1e-6', b: 3, c: no, d: '2024-01-02', e: 'null'}", "--data.prompt_column", "yes"],
]  # fmt: skip


@pytest.mark.parametrize("flags", VARIANTS)
def test_a_dumped_recipe_reads_back_identically(tmp_path: Path, flags: list[str]) -> None:
    recipe = load(*flags)
    path = tmp_path / "config.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(["--config", str(path)], "p", "d") == recipe
    assert dump_recipe(load_recipe(["--config", str(path)], "p", "d")) == path.read_text()


AIME = "--evaluation.benchmarks.aime.data"
FIRST_OF = ["--stop.kind", "first_of", "--stop.rules"]
MISTAKES = [
    (["--stop.windw", "3"], ["stop.windw is not a setting", "Did you mean stop.window?"]),
    (["--stop.treshold.eta", "0.2"], ["stop.treshold is not a setting", "Did you mean stop.threshold?"]),
    (["--stop.top_k", "3"], ["Did you mean rollout.top_k?"]),
    (["--stop.threshold.window", "3"], ["Did you mean stop.window?"]),
    (["--seed", "3"], ["seed is not a setting", "Did you mean run.seed?"]),
    (["--train.every", "3"], ["evaluation.every or checkpoint.every"]),
    (["--stop.tokens", "3"], ["belongs to stop.kind prefix, not to kat", "change stop.kind"]),
    (["--foo.bar", "3"], ["foo is not a setting", "The recipe's sections are run, student"]),
    (["--evaluation.grader.kind", "match", "--evaluation.grader.patern", "(x)"], ["evaluation.grader.pattern?"]),
    (["--run.lost_after_seconds", "0.5"], ["run.lost_after_seconds is 0.5", "at least 5, or 0"]),
    (["--rollout.top_p", "3"], ["rollout.top_p is 3", "number > 0 and <= 1"]),
    (["--rollout.slots", "0"], ["rollout.slots is 0", "whole number >= 1"]),
    (["--rollout.slots", "many"], ["rollout.slots is 'many'", "whole number >= 1"]),
    (["--rollout.slots", "yes"], ["rollout.slots is true", "whole number >= 1"]),
    (["--run.resume", "maybe"], ["run.resume is 'maybe'", "true or false or auto"]),
    (["--rollout.slots"], ["--rollout.slots has no value"]),
    (["--train.epochs", ".inf"], ["train.epochs is inf", "number > 0"]),
    (["--train.optimizer.betas", "[0.9, 1]"], ["train.optimizer.betas[1] is 1", "number >= 0 and < 1"]),
    (["--data.template_options.x", "[1]"], ["data.template_options[x] is [1]"]),
    (["--stop.threshold.source", "mine"], ["stop.threshold.source is 'mine'", "auto | audit | completed | all"]),
    (["--stop.kind", "kta"], ["stop.kind is 'kta'", "kat, never, prefix, random", "did you mean kat"]),
    (["--objective.kind", "x"], ["objective.kind is 'x'", "reverse_kl, forward_kl, jsd, policy_gradient"]),
    (["--stop", "never"], ["stop is 'never'", "section with kind: kat | never"]),
    (["--run.name", "a/b"], ["run.name is 'a/b'", "matching"]),
    (["--stop.window", "5000"], ["stop.window 5000", "rollout.max_new_tokens 4096", "lower stop.window"]),
    (["--stop.kind", "random", "--stop.min_tokens", "9", "--stop.max_tokens", "4"], ["stop.min_tokens 9", "lower"]),
    (["--stop.kind", "prefix", "--stop.grow_from", "2000"], ["stop.grow_from 2000", "stop.tokens 1024", "lower"]),
    (["--stop.kind", "replay"], ["stop.run is missing", "--stop.run"]),
    (["--stop.kind", "first_of"], ["stop.rules is missing", "--stop.rules"]),
    (["--stop.kind", "first_of", "--stop.rules", "[]"], ["stop.rules is []", "list, each item a section with kind: kat | never"]),
    (["--stop.kind", "first_of", "--stop.rules", "[never]"], ["stop.rules[0] is 'never'", "section with kind: kat | never"]),
    ([*FIRST_OF, "[{window: 3}]"], ["stop.rules[0] is {'window': 3}", "section with kind: kat | never"]),
    ([*FIRST_OF, "[{kind: kat}, {kind: first_of}]"], ["stop.rules[1].kind is 'first_of'", "Choose one of kat, never"]),
    ([*FIRST_OF, "[{kind: kat, window: 0}]"], ["stop.rules[0].window is 0", "whole number >= 1"]),
    ([*FIRST_OF, "[{kind: kat, windw: 9}]"], ["stop.rules[0].windw is not a setting", "mean stop.rules[0].window?"]),
    ([*FIRST_OF, "[{kind: kat}, {kind: prefix, eta: 9}]"], ["stop.rules[1].eta is not", "stop.threshold.eta?"]),
    ([*FIRST_OF, "[{kind: kat}, {kind: prefix, window: 9}]"], ["belongs to stop.rules[1].kind kat, not to prefix"]),
    ([*FIRST_OF, "[{kind: replay}]"], ["stop.rules[0].run is missing. Add it to the recipe"]),
    ([*FIRST_OF, "[{kind: kat}, {kind: prefix, tokens: 5000}]"], ["stop.rules[1].tokens 5000", "lower stop.rules[1].tokens"]),
    ([AIME, "x", "--evaluation.benchmarks.aime.smaples", "3"], ["aime.smaples is not", "evaluation.benchmarks.aime.samples?"]),
    ([AIME, "x", "--evaluation.benchmarks.aime.limit", "0"], ["evaluation.benchmarks.aime.limit is 0", "whole number >= 1"]),
    ([AIME, "x", "--evaluation.benchmarks.a/b.data", "y"], ["evaluation.benchmarks has the name 'a/b'", "matching"]),
    (["--evaluation.benchmarks.aime.limit", "3"], ["evaluation.benchmarks.aime.data is missing", "--evaluation.benchmarks.aime.data"]),
    (["--evaluation.benchmarks.aime", "x.jsonl"], ["evaluation.benchmarks.aime is 'x.jsonl'", "section of settings"]),
    (["--teachers.math.gather", "layer"], ["teachers.math.path is missing"]),
    (["--data.train.x", "4"], ["--data.train.x and --data.train contradict"]),
    (["--rollout.slots", "[1"], ["--rollout.slots is '[1'", "not valid YAML"]),
    (["stray"], ["'stray' is not a flag"]),
    (["--config"], ["--config has no value"]),
    (["--rollout.top_p", "2", "--rollout.slots", "0", "--train.steps", "0"], ["rollout.slots is 0", "2 more settings"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "pieces"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistakes_are_explained(flags: list[str], pieces: list[str]) -> None:
    refused(lambda: load(*flags), *pieces)


def test_missing_settings_are_named_by_their_path() -> None:
    refused(lambda: load_recipe([], "p", "d"), "run.name is missing", "--run.name", "3 more settings are wrong")
    flags = [*REQUIRED[:2], *REQUIRED[4:], "--student.pth", "x"]
    # The misspelt key comes first, since it explains the missing one.
    refused(lambda: load_recipe(flags, "p", "d"), "student.pth is not a setting", "student.path", "1 more setting is")


FILES = [
    ("stop: {window: 3\nrollout: {}\n", ["r.yaml:", "not valid YAML"]),
    ("rollout: {slots: 1}\nrollout: {slots: 2}\n", ["r.yaml:6 is", "'rollout' is given twice"]),
    ("stop.window: 3\n", ["stop.window is not a setting", "nested"]),
    ("rollout:\n", ["rollout is null", "section of settings"]),
    ("rollout: {slots: yes}\n", ["rollout.slots is true"]),
    ("rollout: {no: 3}\n", ["r.yaml:5 is", "the key False is not text"]),
]


@pytest.mark.parametrize(("text", "pieces"), FILES)
def test_mistakes_in_files_are_explained(tmp_path: Path, text: str, pieces: list[str]) -> None:
    refused(lambda: from_file(tmp_path / "r.yaml", text), *pieces)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    refused(lambda: load("--config", str(tmp_path / "none.yaml")), "none.yaml", "no such file")
    refused(lambda: load("--config", str(tmp_path)), str(tmp_path), "directory")
    (tmp_path / "list.yaml").write_text("- 1\n")
    refused(lambda: load("--config", str(tmp_path / "list.yaml")), "holds a list", "mapping")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x80")
    refused(lambda: load("--config", str(tmp_path / "bytes.yaml")), "not UTF-8")


def printed(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        load_recipe(flags, "launch/train.py", "Train a student.")
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_setting_in_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["--help"], capsys)
    assert max(map(len, text.splitlines())) <= 100
    for leaf in leaves(Recipe):
        shown = f"{leaf.kind}" if leaf.path.endswith(".kind") else f"--{leaf.path} "
        assert shown in text.replace("\n", " "), leaf.path
        assert leaf.path.endswith(".kind") or leaf.info.description, f"{leaf.path} has no description"
    for piece in (
        "Train a student.",
        "stop.kind kat (default)",
        "current directory",
        "extends",
        "default 4096",
        "required",
    ):
        assert piece in text


def test_help_explains_the_sections_of_a_mapping(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["--help"], capsys)
    for setting in ("evaluation.benchmarks.NAME.prompt_column", "teachers.NAME.gather"):
        assert f"--{setting} " in text.replace("\n", " "), setting


def test_a_benchmark_is_left_out_by_null(tmp_path: Path) -> None:
    text = "evaluation: {samples: 4, benchmarks: {a: {data: a.jsonl}, b: {data: b.jsonl, samples: 9, k: 2}}}"
    every = from_file(tmp_path / "r.yaml", text, *REQUIRED).evaluation.every_benchmark()
    assert {name: (each.samples, each.k) for name, each in every.items()} == {"a": (4, 4), "b": (9, 2)}
    one = from_file(tmp_path / "r.yaml", text, *REQUIRED, "--evaluation.benchmarks.a", "null").evaluation
    assert list(one.every_benchmark()) == ["b"] and one.headline() == ("average/avg@k", "average/pass@k")
    none = from_file(tmp_path / "r.yaml", text, *REQUIRED, "--evaluation.benchmarks", "null").evaluation
    assert none.every_benchmark() == {} and none.headline() == ("avg@4", "pass@4")


def test_printed_config_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed([*REQUIRED, "--stop.window", "9", "--print_config"], capsys)
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(["--config", str(tmp_path / "r.yaml")], "p", "d") == load("--stop.window", "9")


def fail() -> int:
    raise ConfigError("x is 3. Lower it.")


def interrupt() -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [(fail, 2, "error: x is 3. Lower it.\n"), (interrupt, 130, ""), (lambda: None, 0, ""), (lambda: 5, 5, "")],
)
def test_run_main_exit_codes(main, code, said, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == code
    assert capsys.readouterr().err == said


def test_other_errors_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_main(lambda: 1 // 0)
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "1 // 0" in said and "ZeroDivisionError" in said
