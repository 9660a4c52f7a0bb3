"""Run folders with numbers that can be checked by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

ROLLOUTS = 8  # per step
LIMIT = 40  # tokens


def recipe(steps: int, **sections: dict[str, Any]) -> dict[str, Any]:
    basic: dict[str, dict[str, Any]] = {
        "run": {"name": "hand", "seed": 0},
        "student": {"path": "models/student"},
        "teacher": {"path": "models/teacher"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": LIMIT, "audit_fraction": 0.25},
        "stop": {"kind": "kat", "window": 3, "persistence": 2, "threshold": {"eta": 0.3}},
        "objective": {"kind": "reverse_kl"},
        "behaviour": {"kind": "student"},
        "train": {"steps": steps, "optimizer": {"lr": 0.001}},
        "evaluation": {"data": "eval.jsonl"},
    }
    return {key: values | sections.get(key, {}) for key, values in basic.items()}


def step_record(step: int) -> dict[str, Any]:
    """Of a run of KAT: rollouts get shorter by a token per step."""
    return {
        "step": step, "loss/total": 1 / (step + 1), "loss/kl": 0.5, "loss/entropy": 0.25, "train/gradient_norm": 1.0,
        "rollout/length_mean": 30.0 - step % 20, "rollout/kept_mean": 20.0, "rollout/terminated_fraction": 0.5,
        "rollout/saved_fraction": 0.4, "rollout/saved_fraction_total": 0.25, "rollout/kl_mean": 0.125,
        "kat/threshold": 0.01 * (step % 20 + 1), "kat/min_window": 0.5, "kat/false_terminations": 0.5,
        "stop/eos": 0.25, "stop/length": 0.25, "stop/kat": 0.5,
        "time/rollout": 3.0, "time/rollout/decode": 2.0, "time/rollout/teacher": 0.75, "time/learn": 1.5, "time/learn/forward": 1.0,
        "time/report": 0.5, "throughput/rollout_tokens_per_second": 48.0, "memory/peak_bytes": 3 * 2**30,
    }  # fmt: skip


def score_record(step: int, score: float) -> dict[str, Any]:
    scores = {
        "avg@4": score,
        "avg@4_low": score - 0.05,
        "avg@4_high": score + 0.05,
        "length_mean": 12.0,
        "finished": 0.5,
    }
    return {"step": step, **{f"eval/{key}": value for key, value in scores.items()}}


def sample(number: int, **changes: Any) -> dict[str, Any]:
    """A rollout of 12 tokens, of which 5 are kept and 9 were written when the rule knew; `number` 0 and 1 are audit rollouts."""
    pieces = [f"t{i} " for i in range(12)]
    audit = number < 2
    written = pieces if audit else pieces[:9]
    return {
        "id": 100 + number, "prompt": f"question {number}", "response": "".join(written), "pieces": written,
        "reason": "eos" if audit else "kat", "right": True if audit else None, "audit": audit, "tokens": len(written), "kept": 5,
        "cut_at": 9, "kl": [10.0 ** (-i % 5 - 3.5) for i in range(len(written))],
    } | changes  # fmt: skip


def timeline_record(step: int, ranks: int = 2) -> dict[str, Any]:
    phases = {
        str(r): [["rollout", 0.0, 3.0 + r], ["learn", 3.0 + r, 4.5 + r], ["report", 4.5 + r, 5.0 + r]]
        for r in range(ranks)
    }
    return {"step": step, "began": 1.0e9 + step, "ranks": phases, "parts": {}}


def summary(steps: int) -> dict[str, Any]:
    return {
        "steps": steps, "ranks": 2, "rollout_tokens": 912, "learned_tokens": 640, "saved_fraction": 0.256, "terminated_share": 0.5,
        "saved_fraction_since_first_termination": 0.3, "false_termination_share": 0.375, "training_seconds": 3725.0,
        "rollout_tokens_per_second": 0.245, "peak_memory_bytes": 3 * 2**30, "device": "x86_64", "versions": {"katds": "0"},
    }  # fmt: skip


def make_run(folder: Path, steps: int = 4, finished: bool = True, **sections: dict[str, Any]) -> Path:
    """A whole run; take away what a test needs to be missing."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe(steps, **sections), sort_keys=False))
    scores = [score_record(0, 0.125), score_record(steps, 0.625)]
    write(folder / "metrics.jsonl", [scores[0], *map(step_record, range(steps)), scores[1]])
    lengths = [
        {"step": s, "lengths": [LIMIT, 10, 20, 5, 5, 40], "kept": [1] * 6, "reasons": ["eos"] * 6} for s in range(steps)
    ]
    write(folder / "lengths.jsonl", lengths)
    write(folder / "timeline.jsonl", map(timeline_record, range(steps)))
    for step in range(steps):
        rows = [sample(n, id=1000 * step + i) for i, n in enumerate((2, 0, 1))]
        write(folder / "rollouts" / f"step-{step:06d}.jsonl", rows)
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary(steps)))
    return folder


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
