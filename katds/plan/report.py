"""The plan as text, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from katds.plan.advise import Advice
from katds.plan.hardware import GIB, Profile
from katds.plan.items import ALWAYS, LEARN, PLACES, ROLLOUT, STEP, Item, Memory
from katds.plan.job import Job
from katds.plan.scaling import Scenario, ratios
from katds.plan.step_time import StepTime

NOT_MODELLED = (
    "not modelled: Python and kernel launches, evaluations, checkpoints, fragmentation beyond what is set aside, what a sliding "
    "window saves, and experts that no token of a batch goes to"
)


@dataclass(frozen=True)
class Plan:
    job: Job
    profile: Profile
    memory: Memory
    shortfalls: Sequence[str]
    advice: Sequence[Advice]
    step: StepTime
    scaling: str
    scenarios: Sequence[Scenario]
    sources: Sequence[str]

    @property
    def fits(self) -> bool:
        return not self.shortfalls


def text(plan: Plan) -> str:
    job = plan.job
    lines = [
        f"{job.student.name} ({job.student.parameters / 1e9:.3g} G parameters) taught by "
        + ", ".join(f"{t.shape.name} ({t.shape.parameters / 1e9:.3g} G, gather {t.gather})" for t in job.teachers)
        + f", on {job.ranks} x {plan.profile.name}: predicted, not measured",
        *plan.sources,
        "",
        *_memory(plan),
        "",
        *plan.shortfalls,
        *_advice(plan.advice),
        "",
        *_time(plan),
        "",
        *_volume(plan),
        *_links(plan),
        *_scaling(plan),
        NOT_MODELLED,
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    found, profile = plan.memory, plan.profile
    peaks = {"rollout": found.peak(ROLLOUT), "learn": found.peak(LEARN)}
    rows: list[tuple[str, ...]] = [("GiB of a rank, at the peak of each phase", "rollout", "learn", "")]
    for item in found.items:
        if item.place == "device":
            cells = [_gib(item.bytes) if moment in item.moments else "" for _, moment in peaks.values()]
            if any(cells):
                rows.append((item.name, *cells, item.how))
    rows.append(
        ("peak", *(_gib(size) for size, _ in peaks.values()), ", ".join(f"{k}: {m}" for k, (_, m) in peaks.items()))
    )
    reserve = f"of {profile.memory / GIB:.1f}, less 5% and 2 GiB for CUDA, NCCL and fragmentation (assumed)"
    room = (
        reserve
        if profile.device == "cuda"
        else f"of {profile.memory / GIB:.1f}; a process without a model has some 0.6"
    )
    rows.append(("left", *(_gib(profile.usable - size) for size, _ in peaks.values()), room))
    return [*aligned(rows, "l>>l"), *_host(plan)]


def _host(plan: Plan) -> list[str]:
    """What lies elsewhere. On a CPU that is the same memory."""
    found, profile, ranks = plan.memory, plan.profile, plan.job.on_node
    if found.device == "cpu":
        return []
    known = f"of {profile.host_memory / GIB:.0f}" if profile.host_memory else "how large it is is unknown: --host-gib"
    rows: list[tuple[str, ...]] = []
    for title, moments in (("while models are read", ("load",)), ("in a step", STEP)):
        size, moment = found.peak(moments, "cpu", ranks)
        if size:
            largest = ", ".join(f"{item.name} {_gib(_on_node(item, ranks))}" for item in found.largest(moment, "cpu"))
            rows.append((f"host memory of a node {title}", _gib(size), f"{known}; {largest}"))
    if disk := found.peak(ALWAYS, "nvme", ranks)[0]:
        rows.append(("on a node's NVMe", _gib(disk), ""))
    return ["", *aligned([(f"GiB of a node, {ranks} ranks", "", ""), *rows], "l>l")] if rows else []


def _on_node(item: Item, ranks: int) -> int:
    return item.bytes * (1 if item.once else ranks)


def _advice(advice: Iterable[Advice]) -> list[str]:
    rows = [(f"suggested {a.setting}", "-" if a.value is None else str(a.value), a.reason) for a in advice]
    return aligned(rows, "l>l")


def _time(plan: Plan) -> list[str]:
    step = plan.step
    rows: list[tuple[str, ...]] = [("seconds of a step", "", "share")]
    for phase, seconds in step.seconds.items():
        rows.append((phase, f"{seconds:.3g}", f"{seconds / step.total:.0%}"))
    waiting = (f"{step.waiting:.3g}", f"{step.waiting / step.total:.0%}")
    rows += [("step", f"{step.total:.3g}", ""), ("  of the rollouts, waiting for the slowest rank", *waiting)]
    rate = f"{step.tokens / step.total:,.0f} rollout tokens/s, {step.rounds} rounds, {step.micro_batches} micro-batches of a rank"
    return [*aligned(rows, "l>>"), rate]


def _volume(plan: Plan) -> list[str]:
    """What a rank moves in a step."""
    step = plan.step
    if not step.flows:
        return []
    rows: list[tuple[str, ...]] = [("moved by a rank in a step", "collectives", "GiB", "seconds", "of the step", "")]
    for purpose, flow in step.flows.items():
        among = "" if flow.ranks == plan.job.ranks else f"among {flow.ranks} ranks"
        wire = step.wire[purpose]
        rows.append(
            (purpose, f"{flow.calls:,}", _small(flow.received), f"{wire:.3g}", f"{wire / step.total:.0%}", among)
        )
    total, seconds = sum(f.received for f in step.flows.values()), sum(step.wire.values())
    rows.append(("all", "", _small(total), f"{seconds:.3g}", f"{seconds / step.total:.0%}", ""))
    beside = "what is gathered while a layer computes costs no time of its own: shares are as if it did"
    return [*aligned(rows, "l>>>>l"), *([beside] if plan.profile.overlaps else []), ""]


def _links(plan: Plan) -> list[str]:
    """What offload moves in a step."""
    step = plan.step
    if not step.links:
        return []
    head = ("moved by a rank and its host", "GiB to the device", "to the host", "NVMe", "seconds", "of the step")
    rows: list[tuple[str, ...]] = [head]
    for purpose, link in step.links.items():
        seconds = step.copying[purpose]
        sizes = (link.to_device, link.to_host, link.from_disk + link.to_disk)
        rows.append((purpose, *map(_small, sizes), f"{seconds:.3g}", f"{seconds / step.total:.0%}"))
    return [*aligned(rows, "l>>>>>"), ""]


def _small(size: float) -> str:
    return f"{size / GIB:.3g}"


def _scaling(plan: Plan) -> list[str]:
    """Of several draws the mean, and the lowest and highest."""
    if not plan.scenarios:
        return []
    names = list(dict.fromkeys(scenario.name for scenario in plan.scenarios))
    by = {(s.ranks, s.name): s for s in plan.scenarios}
    rows: list[tuple[str, ...]] = [
        ("ranks", "rollouts", "draws", *(cell for name in names for cell in (f"{name} [s]", "", "waiting")),
         *(["ratio", ""] if len(names) > 1 else []), ""),
    ]  # fmt: skip
    for ranks in dict.fromkeys(scenario.ranks for scenario in plan.scenarios):
        own = [by[ranks, name] for name in names]
        cells = [cell for s in own for cell in (f"{s.total:.3g}", _spread(s.seconds), f"{s.waiting:.0%}")]
        # Of many steps together: the mean of their ratios would be larger.
        ratio = (f"{own[-1].total / own[0].total:.2f}", _spread(ratios(own[-1], own[0]))) if len(own) > 1 else ()
        rows.append(
            (
                str(ranks),
                str(own[0].rollouts),
                str(len(own[0].times)),
                *cells,
                *ratio,
                "" if all(s.fits for s in own) else "does not fit",
            )
        )
    title = f"simulated steps, {plan.scaling}; means over draws (lowest .. highest)"
    return [title, *aligned(rows, ">" * len(rows[0])), ""]


def _spread(values: Sequence[float]) -> str:
    return f"({min(values):.3g} .. {max(values):.3g})"


def as_json(plan: Plan) -> dict[str, Any]:
    """Every number of the text, in bytes and seconds."""
    found = plan.memory
    return {
        "predicted": True, "ranks": plan.job.ranks, "profile": asdict(plan.profile), "sources": list(plan.sources),
        "items": [asdict(item) for item in found.items],
        "peaks": {moment: {p: found.at(moment, p) for p in PLACES} for moment in ALWAYS},
        "node": {moment: found.at(moment, "cpu", plan.job.on_node) for moment in ALWAYS},
        "usable_bytes": plan.profile.usable, "fits": plan.fits, "shortfalls": list(plan.shortfalls),
        "advice": [asdict(a) for a in plan.advice], "step": asdict(plan.step) | {"total": plan.step.total},
        "scaling": plan.scaling, "scenarios": [scenario.as_json() for scenario in plan.scenarios],
        "not_modelled": NOT_MODELLED,
    }  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def aligned(rows: Sequence[Sequence[str]], layout: str) -> list[str]:
    """Columns side by side; `layout`: l or > for each."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(layout))] if rows else []
    return [
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, layout, strict=True)
        ).rstrip()
        for row in rows
    ]
