"""What a machine can do: data sheets of common GPUs, or a profile that was measured (`launch/plan.py --measure`)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from katds.errors import ConfigError

GIB = 2**30
# Of a GPU's memory: CUDA's context, libraries and NCCL's buffers, and what the allocator cannot use. Round figures, not measured.
RESERVED_BYTES, RESERVED_SHARE = 2 * GIB, 0.05


@dataclass(frozen=True)
class Profile:
    """One device and its links; seconds, bytes/s and operations/s. Rates are those to be expected, not the peaks.

    Args:
        device: "cuda" or "cpu".
        memory: bytes that the driver reports.
        flops: of matrix products in the type that models are held in.
        bandwidth: of memory, read or written.
        devices: per node.
        inside, between: bytes/s that a device receives while all do, from its node and from other nodes.
        latency: of a collective, per doubling of the ranks.
        token_step: of a decode step beyond its arithmetic and memory: sampling's launches.
        overlaps: weights are gathered while others are multiplied with.
        host_memory: of a node, bytes; 0: unknown. Its devices share it, and host_bandwidth, at which it is read or written.
        host_link: between a device and its host, in one direction, while all devices use theirs. disk: of a node, read or written.
        measured_ranks, measured_nodes: that it was measured on; 0: it was not.
    """

    name: str
    device: str
    memory: int
    flops: float
    bandwidth: float
    devices: int
    inside: float
    between: float
    latency: float
    token_step: float
    overlaps: bool
    source: str
    host_memory: int = 0
    host_bandwidth: float = 2e11
    host_link: float = 2e10
    disk: float = 5e9
    measured_ranks: int = 0
    measured_nodes: int = 0

    def unmeasured(self, ranks: int) -> list[str]:
        """What a measured profile says nothing of, on so many ranks."""
        if self.measured_ranks == 1 and ranks > 1:
            return [
                "warning: the profile was measured on one rank, so that moving between ranks costs no time here; measure under the launcher"
            ]
        if self.measured_nodes == 1 and ranks > self.devices:
            return [
                "warning: the profile was measured on one node, whose links are taken for those between nodes; measure on two"
            ]
        return []

    @property
    def usable(self) -> int:
        """Bytes for a run."""
        return int(self.memory * (1 - RESERVED_SHARE) - RESERVED_BYTES) if self.device == "cuda" else self.memory

    def doublings(self, ranks: int) -> int:
        return (ranks - 1).bit_length()

    def collective(self, size: float, ranks: int, calls: float = 1) -> float:
        """Seconds in which every rank receives `size` bytes, or gives them away, in so many calls: an all-gather or reduce-scatter.

        What comes from a rank's own node and what comes from others flow at once.
        """
        if ranks == 1:
            return 0.0
        local = min(ranks, self.devices)
        nodes = -(-ranks // self.devices)
        inside = size * (local - 1) / local / self.inside
        between = size * (nodes - 1) / nodes / (local * self.between)
        return max(inside, between) + calls * self.latency * self.doublings(ranks)


def _gpu(
    name: str, mebibytes: int, teraflops: float, terabytes: float, inside: float, between: float, host: float, devices: int = 8
) -> Profile:  # fmt: skip
    """Gigabytes/s of the links, in one direction, per GPU; `host`: PCIe's. Shares of the peaks that are usually reached, and what a node's
    memory and disks do: assumed, not measured."""
    return Profile(
        name, "cuda", mebibytes * 2**20, 0.5e12 * teraflops, 0.7e12 * terabytes, devices, 0.7e9 * inside, 0.7e9 * between, 1e-5,
        5e-4, True, f"data sheet: {teraflops:g} TFLOP/s bf16 x 0.5, {terabytes:g} TB/s x 0.7, links {inside:g} and {between:g} GB/s x 0.7 "
        "(the shares are assumed)", host_link=0.7e9 * host,
    )  # fmt: skip


# Memory as nvidia-smi shows it; dense bf16; NVLink or PCIe within a node, one network card per GPU between nodes.
GPUS = {
    p.name: p
    for p in (
        _gpu("h100", 81559, 989, 3.35, 450, 50, 64),
        _gpu("h200", 143771, 989, 4.8, 450, 50, 64),
        _gpu("a100-80", 81920, 312, 2.04, 300, 25, 32),
        _gpu("a100-40", 40960, 312, 1.56, 300, 25, 32),
        _gpu("b200", 183359, 2250, 7.7, 900, 50, 64),
        _gpu("l40s", 46068, 362, 0.864, 25, 12.5, 32),
        _gpu("rtx4090", 24564, 165, 1.01, 25, 3, 32),
    )
}


def read_profile(path: Path) -> Profile:
    """Raises ConfigError."""
    try:
        values = json.loads(path.read_text())
        profile = Profile(**values)
        numbers = [getattr(profile, field.name) for field in fields(Profile) if field.type in ("int", "float")]
        if any(
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
            for value in numbers
        ):
            raise ValueError("memory, devices, rates and times must be numbers")
        if profile.device not in ("cuda", "cpu"):
            raise ValueError(f"device is {profile.device!r}, not cuda or cpu")
        positive = ("flops", "bandwidth", "devices", "inside", "between", "host_bandwidth", "host_link", "disk")
        if min(numbers) < 0 or 0 in (getattr(profile, name) for name in positive):
            raise ValueError("rates and devices must be above 0")
    except (OSError, ValueError, TypeError) as error:
        wanted = ", ".join(field.name for field in fields(Profile))
        raise ConfigError(
            f"--profile: {path} is no profile ({str(error).partition(chr(10))[0]}). Write one with --measure; it holds {wanted}."
        ) from None
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    try:
        path.write_text(json.dumps(asdict(profile), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--measure: {path} cannot be written ({error.strerror}). Give another file.") from None


def find(name: str | None, profile: Path | None, devices: int | None, host_memory: int | None = None) -> Profile:
    """Of the data sheets by name, or from a file. `devices` per node and `host_memory` (bytes of a node) replace theirs."""
    if (name is None) == (profile is None):
        raise ConfigError(
            f"Give --gpu NAME ({', '.join(GPUS)}) or --profile FILE, one of them: the plan is for a device."
        )
    if profile is not None:
        found = read_profile(profile)
    elif name in GPUS:
        found = GPUS[name]
    else:
        raise ConfigError(f"--gpu is {name!r}, which is not known. Give one of {', '.join(GPUS)}, or --profile FILE.")
    return replace(
        found,
        devices=found.devices if devices is None else devices,
        host_memory=found.host_memory if host_memory is None else host_memory,
    )
