"""`bench gpu` at toy size on a CPU: every part runs, errors become rows, and a machine without a GPU is told so."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from katds.bench import gpu
from katds.bench.gpu import attention, decode, machine, step, teacher
from katds.bench.ranks import on_ranks
from katds.errors import ConfigError


def options(*more: str, out: Path | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.options(parser)
    parsed = parser.parse_args([*gpu.SMOKE, *more])
    if out is not None:
        parsed.out = out
    return parsed


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part != "step"])
def test_a_part_runs(part: str, tmp_path: Path) -> None:
    result = gpu.run(options("--parts", part, out=tmp_path))
    assert result.rows and all(set(row) == set(gpu.COLUMNS) for row in result.rows)
    for row in result.rows:
        assert row["part"] == part and row["error"] is None and row["ms"] > 0 and row["tokens/s"] > 0
        assert row["x floor" if part == "decode" else "MFU"] > 0
    file = saved(tmp_path)
    assert len(file["rows"]) == len(result.rows) and file["settings"]["product_flops"] > 0
    assert all(len(sample["seconds"]) == 1 for sample in file["samples"])


def toy(**more: Any) -> machine.Bench:
    """Not measured: 1e9 bytes/s and 1e12 FLOP/s."""
    settings = {
        "device": torch.device("cpu"),
        "toy": True,
        "context": 8,
        "repetitions": 1,
        "product": 8,
        "copy_bytes": 8,
    }
    return machine.Bench(**(settings | {"bandwidth": 1e9, "peak": 1e12} | more))


@pytest.mark.parametrize("compiler", ["", "/nonexistent"])
def test_a_step_runs_with_and_without_a_compiler(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `step` does, in a process of its own: it joins a world."""
    monkeypatch.setenv("CC", compiler)
    (row,) = on_ranks(1, step.whole_steps, "smoke", step.WAYS[-1], 2, "torch.float32")
    assert row["tokens/s"] > 0 and len(row["seconds"]) == 2
    assert row["ms"] == pytest.approx(1e3 * statistics.median(row["seconds"]))


def test_only_a_gpu_must_not_decode_operator_by_operator(capsys: pytest.CaptureFixture[str]) -> None:
    line = "decoding goes through transformers, operator by operator: why"
    step.hear(f"step 1\n{line}\n", torch.device("cpu"))
    assert capsys.readouterr().err == f"gpu: {line}\n"
    step.hear("step 1", torch.device("cuda"))
    with pytest.raises(RuntimeError, match="operator by operator: why"):
        step.hear(f"step 1\n{line}\n", torch.device("cuda"))


def cases_of(*measured: tuple[str, Callable[[], dict[str, Any]]]) -> Callable[[Any], Iterator[machine.Case]]:
    return lambda bench: iter(measured)


def test_a_failing_case_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def long() -> dict[str, Any]:
        raise ValueError("Traceback of another process\n" * 40 + "the message")

    def broken(bench: Any) -> Iterator[machine.Case]:
        yield "first", long
        yield "second", lambda: {"ms": 1.0}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(teacher, "cases", broken)
    with pytest.raises(RuntimeError, match=r"2 of 4 cases failed.*ValueError"):
        gpu.run(options("--parts", "teacher", "attention", out=tmp_path))
    rows = saved(tmp_path)["rows"]
    assert [(row["case"], bool(row["error"])) for row in rows[:3]] == [
        ("first", True),
        ("second", False),
        ("set-up", True),
    ]
    assert rows[0]["error"].endswith("the message") and len(rows[0]["error"]) == len("ValueError: ") + 500
    assert "in long" in capsys.readouterr().err, "where it came from"
    assert rows[3]["part"] == "attention" and rows[3]["ms"] > 0


def saved(folder: Path) -> Any:
    return json.loads((folder / "gpu.json").read_text())


def test_parts_of_an_earlier_run_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(module: Any, name: str, ms: float) -> list[str]:
        monkeypatch.setattr(module, "cases", cases_of(("a", lambda: {"ms": ms, "seconds": [ms / 1e3]})))
        return ["--parts", name]

    gpu.run(options(*part(teacher, "teacher", 1.0), out=tmp_path))
    first = saved(tmp_path)["settings"]["measured"]["teacher"]
    gpu.run(options(*part(attention, "attention", 2.0), out=tmp_path))
    gpu.run(options(*part(decode, "decode", 3.0), out=tmp_path))
    result = gpu.run(options(*part(attention, "attention", 4.0), out=tmp_path))
    expected = [("decode", 3.0), ("teacher", 1.0), ("attention", 4.0)]
    assert [(row["part"], row["ms"]) for row in result.rows] == expected
    file = saved(tmp_path)
    assert [(row["part"], row["ms"]) for row in file["rows"]] == expected
    assert [row["seconds"] for row in file["samples"]] == [[0.003], [0.001], [0.004]]
    assert file["settings"]["measured"].keys() == {"decode", "teacher", "attention"}
    assert file["settings"]["measured"]["teacher"] == first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file["settings"].update(context=9), "other context"),
        (lambda file: file["settings"].update(device_name="NVIDIA H200", toy=False), "other device_name, toy"),
        (lambda file: file.pop("settings"), "other format"),
        (lambda file: file["settings"].pop("measured"), "other format"),
    ],
)
def test_unlike_measurements_are_not_mixed(
    change: Callable[[Any], Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(teacher, "cases", cases_of(("a", lambda: {"ms": 1.0})))
    monkeypatch.setattr(attention, "cases", cases_of(("a", lambda: {"ms": 2.0})))
    gpu.run(options("--parts", "teacher", out=tmp_path))
    file = saved(tmp_path)
    change(file)
    (tmp_path / "gpu.json").write_text(json.dumps(file))
    gpu.run(options("--parts", "attention", out=tmp_path))
    assert f"{tmp_path / 'gpu.json'} will be replaced: {said}\n" in capsys.readouterr().err
    assert [row["part"] for row in saved(tmp_path)["rows"]] == ["attention"]


@pytest.mark.parametrize("option", ["--context", "--repetitions"])
def test_numbers_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(option, "0")
    assert f"{option}: '0' is not a whole number of at least 1" in capsys.readouterr().err


def test_the_kernels_that_a_machine_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions, signature = machine.software()
    assert f"torch {torch.__version__}" in versions and signature.startswith("varlen_attn(query")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v, *, scale, window_size, enable_gqa: q)
    assert machine.software()[-1] == "varlen_attn lacks seqused_k, block_table, num_splits"
    monkeypatch.delattr("torch.nn.attention.varlen.varlen_attn")
    assert "varlen_attn is missing" in machine.software()[-1]


def test_all_repetitions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = toy(repetitions=3)
    monkeypatch.setattr(machine, "alternate", lambda contenders, repetitions, *_: {"": [2.0, 9.0, 4.0][:repetitions]})
    assert bench.race({"": int}, inner=4) == {"": [0.5, 2.25, 1.0]}
    assert bench.timed(int, tokens=100, flops=1e12) == {
        "ms": 4000.0, "tokens/s": 25.0, "seconds": [2.0, 9.0, 4.0], "MFU": 0.25, "MFU (sheet)": None,
    }  # fmt: skip


def test_peak_memory_is_counted_from_what_lay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    device = {
        "synchronize": lambda: calls.append("settle"), "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: calls.append("reset"),
        "memory_allocated": lambda: 3 * machine.GIB, "max_memory_allocated": lambda: 5 * machine.GIB,
    }  # fmt: skip
    for name, function in device.items():
        monkeypatch.setattr(torch.cuda, name, function)
    bench = toy(device=torch.device("cuda"))
    assert bench.peak_gib(lambda: calls.append("run")) == 2.0
    assert calls == ["settle", "reset", "run", "settle"]
    assert bench.whole_gib(lambda: None) == 5.0
    ran: list[bool] = []
    assert toy().whole_gib(lambda: ran.append(True)) is None and ran == [True]


class Scripted(machine.Bench):
    """Takes known times: 12 s eagerly, 3 s otherwise, or fails."""

    races = 0
    fails = False

    def race(self, contenders: Mapping[str, Callable[[], Any]], inner: int = 1) -> dict[str, list[float]]:
        self.races += 1
        if self.fails:
            raise RuntimeError("out of memory")
        return {name: [12.0, 6.0, 12.0] if name == "eager" else [3.0, 3.0, 3.0] for name in contenders}

    def held_gib(self) -> float:
        return 7.0

    def peak_gib(self, run: Callable[[], Any]) -> float:
        run()
        return 0.5


def decoding() -> tuple[Scripted, decode.Race]:
    shape = machine.TOY["toy student"]
    bench = Scripted(**vars(toy()))
    return bench, decode.Race(bench, bench.model(shape), shape, batch=6)


def test_decoding_against_the_floor_and_against_eager() -> None:
    bench, race = decoding()
    rows = {title: race.row(title) for title in race.titles}
    assert list(rows) == ["eager", "static eager", "static eager + sampling"] and bench.races == 1
    row = rows["static eager"]
    assert row["ms"] == 3000 and row["tokens/s"] == 2.0 and row["seconds"] == [3.0] * 3 and row["GiB"] == 7.5
    # Weights of attention (64 x 128 twice, 64 x 64 twice), of the other part (3 x 64 x 128) and of the head.
    weights = 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128) + 512 * 64
    seconds = 4 * (weights + 2 * 6 * 8 * 2 * 2 * 32) / 1e9
    assert row["floor ms"] == pytest.approx(1e3 * seconds) and row["x floor"] == pytest.approx(3 / seconds)
    assert row["speed-up"] == 4.0 and rows["eager"]["speed-up"] == 1.0
    assert "speed-up" not in rows["static eager + sampling"], "sampling is more work"


def test_a_way_that_fails_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    class Broken(decode.StaticStep):
        def __call__(self, *_: Any) -> torch.Tensor:
            made.append(weakref.ref(self))
            try:
                raise RuntimeError("launch failed")
            except RuntimeError as error:
                raise ValueError("no graph") from error

    monkeypatch.setattr(decode, "StaticStep", Broken)
    bench, race = decoding()
    assert race.row("eager")["speed-up"] == 1.0
    for _ in range(2):
        with pytest.raises(ValueError, match="no graph"):
            race.row("static eager")
    gc.collect()
    assert len(made) == 2 and [ref() for ref in made] == [None, None], "an error holds on to what it came through"
    assert bench.races == 1


def test_a_race_that_fails_is_not_run_again() -> None:
    bench, race = decoding()
    bench.fails = True
    for title in race.titles:
        with pytest.raises(RuntimeError, match="out of memory"):
            race.row(title)
    assert bench.races == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_toys() -> None:
    parsed = options()
    parsed.toy = False
    with pytest.raises(ConfigError, match="--toy"):
        gpu.run(parsed)


def test_shapes_are_those_of_qwen3() -> None:
    """Parameters as the model cards count them, embedding included."""
    for name, billions in (("0.6B", 0.6), ("1.7B", 1.72), ("8B", 8.19)):
        config = machine.SHAPES[name].config()
        with torch.device("meta"):
            model = machine.AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_data_sheets_by_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = toy(device=torch.device("cuda"))
    for name, flops in (
        ("NVIDIA H200", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("T4", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert (bench.sheet or (None,))[0] == flops
