"""What a step takes, phase by phase, and what a rank moves in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from katds.plan.hardware import Profile
from katds.plan.job import Job
from katds.plan.offload import Link
from katds.plan.volume import Flow


@dataclass
class StepTime:
    """Seconds of the slowest rank by phase, tokens over all ranks, and collectives of a rank."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    decoded: int = 0
    rounds: int = 0
    micro_batches: int = 0
    flows: dict[str, Flow] = field(default_factory=dict)  # what a rank moves, by its purpose
    wire: dict[str, float] = field(default_factory=dict)  # seconds of each, with nothing beside it
    links: dict[str, Link] = field(default_factory=dict)  # what moves between a rank and its host
    copying: dict[str, float] = field(default_factory=dict)  # seconds of each
    waiting: float = 0.0  # seconds of the rollout phase in which the mean rank waits for the slowest one

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def join(self, other: StepTime) -> None:
        """Adds what the teacher writes: its time and what it moves, but neither rounds nor tokens of the student."""
        for phase, seconds in other.seconds.items():
            self.add(phase, seconds)
        for purpose, flow in other.flows.items():
            self.flows[purpose] = self.flows.get(purpose, Flow()) + flow
            self.wire[purpose] = self.wire.get(purpose, 0.0) + other.wire[purpose]
        for purpose, link in other.links.items():
            self.links[purpose] = self.links.get(purpose, Link()) + link
            self.copying[purpose] = self.copying.get(purpose, 0.0) + other.copying[purpose]

    def move(self, purpose: str, flow: Flow, profile: Profile) -> float:
        """Counts the flow; returns its seconds."""
        seconds = flow.seconds(profile)
        if flow.calls:
            self.flows[purpose] = self.flows.get(purpose, Flow()) + flow
            self.wire[purpose] = self.wire.get(purpose, 0.0) + seconds
        return seconds

    def copy(self, purpose: str, link: Link, job: Job, profile: Profile) -> float:
        """The same of what moves between a rank and its host."""
        seconds = link.seconds(profile, job.on_node)
        if link:
            self.links[purpose] = self.links.get(purpose, Link()) + link
            self.copying[purpose] = self.copying.get(purpose, 0.0) + seconds
        return seconds

    @property
    def total(self) -> float:
        return sum(self.seconds.values())
