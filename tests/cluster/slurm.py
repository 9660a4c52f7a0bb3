"""A Slurm on hosts of this machine: slurmctld on the first of them, slurmd and munge on all.

Every host has one GPU (/dev/null, by its looks), so that jobs ask for theirs as on a real cluster. Two partitions share all hosts:
jobs of `work` make room for those of `urgent`, are told so by SIGTERM, and have GRACE_SECONDS to leave. Nothing of the machine's own
set-up is read or changed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from hosts import Hosts, search_path, until

PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
GRACE_SECONDS = 240
# How long a node may be silent before Slurm itself calls it down, and how long a job waits that has been queued again.
NODE_TIMEOUT_SECONDS = 20
AGAIN_SECONDS = 10
CONFIG = """ClusterName=katds
SlurmctldHost={first}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire={again}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout={timeout}
KillWait=5
ReturnToService=2
GresTypes=gpu
NodeName={names} CPUs=2 Gres=gpu:1
PartitionName=work Nodes={names} PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} Default=YES
PartitionName=urgent Nodes={names} PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """Which program is not there, or ""."""
    for program, package in PROGRAMS.items():
        if shutil.which(program, path=search_path()) is None:
            return f"{program} is not installed (Debian package {package})"
    return ""


class Slurm:
    """Runs for as long as `hosts` are open; the first of them is the controller's."""

    def __init__(self, hosts: Hosts, grace: int = GRACE_SECONDS) -> None:
        self._hosts, self.folder = hosts, hosts.folder / "slurm"
        (self.folder / "state").mkdir(parents=True)
        first, names = hosts.names[0], ",".join(hosts.names)
        self._config, self._key = self.folder / "slurm.conf", self.folder / "munge.key"
        self._config.write_text(
            CONFIG.format(
                first=first, address=hosts.address(first), folder=self.folder, names=names, grace=grace,
                timeout=NODE_TIMEOUT_SECONDS, again=AGAIN_SECONDS,
            )
        )  # fmt: skip
        # slurmd initialises its plugin for cgroups though nothing uses it; that of version 1 does not look for them then.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        self._key.write_bytes(os.urandom(128))
        self._key.chmod(0o400)
        for name in hosts.names:
            self._start_munge(name)
        self._start(first, "slurmctld", "-D", "-f", self._config)
        for name in hosts.names:
            self._start(name, "slurmd", "-D", "-f", self._config)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Until all are there and have nothing to do."""
        words = ("sinfo", "--noheader", "--Node", "--partition", "work", "--format", "%T")
        idle = ["idle"] * len(self._hosts.names)
        until(lambda: self.ask(*words, check=False).split() == idle, lambda: f"nodes are not idle: {self.told()}", 60)

    def submit(self, *words: object, **variables: str) -> str:
        """sbatch, in this process's working directory; the job's number."""
        return self.ask("sbatch", "--parsable", *words, **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of it: JobState, Restarts, NodeList, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", number)))

    def ask(self, *words: object, check: bool = True, **variables: str) -> str:
        """What a command says, run on the first host."""
        asked = self._hosts.start(self._hosts.names[0], words, **variables | self._variables)
        said = asked.communicate(timeout=60)[0]
        assert asked.returncode == 0 or not check, f"{words}: {said}"
        return said

    def told(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"== {file.name}\n{file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log")))

    @property
    def _variables(self) -> Mapping[str, str]:
        return {"SLURM_CONF": str(self._config)}

    def _start_munge(self, name: str) -> None:
        place = "/run/munge"  # the host's own, where all look for it
        subprocess.run([*self._hosts.enter(name), "mkdir", "-m", "755", place], check=True)
        self._start(
            name, "munged", "--foreground", "--force", "--key-file", self._key, "--seed-file", f"{place}/seed",
            "--pid-file", f"{place}/pid",
        )  # fmt: skip

    def _start(self, name: str, program: str, *words: object) -> None:
        path = shutil.which(program, path=search_path())
        assert path is not None
        self._hosts.start(name, [path, *words], self.folder / f"{program}-{name}.log", **self._variables)
