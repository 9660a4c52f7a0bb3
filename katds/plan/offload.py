"""Bytes that offloaded parameters and optimizer states move between a device and its host in a step, and what they cost there.

As DeepSpeed 0.19 copies them (stage3.py, partition_parameters.py), of the fullest rank:

- offload_param: whatever is gathered comes from the host first, this rank's own part of it; what lies on NVMe is read from there.
- offload_optimizer: after a micro-batch the rank's part of the gradients goes to the host and comes back for their norm; every further one
  adds to it on the device, so that it comes first and goes back then. At an update it goes once more, in float32, to where the
  optimizer reads it; the updated weights come back, unless they lie on the host as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from katds.plan.hardware import Profile
from katds.plan.job import Job
from katds.plan.volume import Flow
from katds.plan.zero import ZeroSettings, on_disk, shard

FP32 = 4


@dataclass(frozen=True)
class Link:
    """Bytes of one rank, by the way that they go."""

    to_device: int = 0
    to_host: int = 0
    from_disk: int = 0
    to_disk: int = 0

    def __add__(self, other: Link) -> Link:
        return Link(
            self.to_device + other.to_device,
            self.to_host + other.to_host,
            self.from_disk + other.from_disk,
            self.to_disk + other.to_disk,
        )

    def times(self, count: int) -> Link:
        return Link(self.to_device * count, self.to_host * count, self.from_disk * count, self.to_disk * count)

    def __bool__(self) -> bool:
        return self != Link()

    def seconds(self, profile: Profile, on_node: int) -> float:
        """Both ways of the link are used at once; a node's disks serve its ranks together."""
        link = max(self.to_device, self.to_host) / profile.host_link
        return max(link, on_node * (self.from_disk + self.to_disk) / profile.disk)


def fetched(flow: Flow, zero: ZeroSettings, sizes: Sequence[int], ranks: int) -> Link:
    """What a gather takes from the host first. `sizes`: of the whole model; of what is gathered as large a part lies on NVMe as of it."""
    if not zero.away:
        return Link()
    whole = shard(sizes, ranks)
    return Link(to_device=flow.own, from_disk=flow.own * on_disk(whole, zero) // max(1, whole))


def gradients(job: Job, last: bool) -> Link:
    """Of one micro-batch; `last`: the update's."""
    if job.zero.optimizer_on == "device" or job.device == "cpu":
        return Link()
    own = shard(job.student.sizes, job.ranks)
    size = own * job.zero.gradients.itemsize
    return Link(to_device=size, to_host=size + (FP32 * own if last else 0))


def weights(job: Job) -> Link:
    """After an update: to where they are gathered from."""
    own, width = shard(job.student.sizes, job.ranks), job.student.width
    disk = on_disk(own, job.zero) * width
    if job.device == "cpu" or job.zero.away == (job.zero.optimizer_on != "device"):
        return Link(to_disk=disk)  # both in one place
    return Link(to_host=own * width, to_disk=disk) if job.zero.away else Link(to_device=own * width)


def optimizer_seconds(job: Job, profile: Profile) -> float:
    """Gradients are read, weights and both moments read and written, and the model's own weights written: by the host, whose ranks do so at
    once, or by the device, which copies the gradients first."""
    own = shard(job.student.sizes, job.ranks)
    touched = own * (FP32 + 2 * 3 * FP32 + job.student.width)
    if job.zero.optimizer_on == "device" or job.device == "cpu":
        return (touched + own * 2 * FP32) / profile.bandwidth
    return touched * job.on_node / profile.host_bandwidth
