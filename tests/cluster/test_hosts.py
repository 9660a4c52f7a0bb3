"""Runs over several hosts, started as a user starts them, are the run on one host; one that loses a host ends, and goes on without it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import Hosts, missing, remove_abandoned
from same_run import LOST_AFTER, assert_is_alike, assert_is_that_on_one_host, assert_same, losing_recipe
from whole_runs import full_run, records, train
from zoo import shared_folder

from katds.parallel.heartbeat import EXIT_CODE

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TRAIN = Path("launch/train.py")
# Where the launcher ends only when every connection has: one that is dead is given up after six seconds.
SSH_PATIENCE = "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := missing():
        # .ci/run has installed them; namespaces are the machine's to give.
        assert "KATDS_CI_HOSTS" not in os.environ or "not installed" not in reason, reason
        pytest.skip(reason)
    with Hosts("abc") as three:
        yield three


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory)


def assert_all_know_of_c(logs: dict[str, Path], folder: Path) -> None:
    """The last line of each host's rank."""
    for rank, host in enumerate("abc"):
        gone = "host c (rank 2)" if rank < 2 else "host a (rank 0), which leads the run,"
        text = logs[host].read_text()
        since = rf"{re.escape(gone)} has been silent since [\d:]+ \(\d+ s\): .*exit code {EXIT_CODE}"
        (said,) = re.findall(rf"^error on host {host} \(rank {rank}\): {since}.*$", text, re.MULTILINE)
        assert f"--run.resume auto: it goes on from the newest checkpoint in {folder}/run/checkpoints" in said, text[
            -2000:
        ]
    assert not (folder / "run/final").exists(), "it was over before the link was down"


@pytest.fixture
def launch(hosts: Hosts, tmp_path: Path) -> Any:
    """The command line of a launcher, and what it needs beside it."""
    # The launcher passes on only some of its environment; this file is its place for the rest.
    (tmp_path / "environment").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nHF_HUB_OFFLINE=1\n")
    # ssh passes on nothing.
    (tmp_path / "python").write_text(
        f"#!/bin/sh\nexport PYTHONPATH='{ROOT}' OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu\nexec '{sys.executable}' \"$@\"\n"
    )
    (tmp_path / "python").chmod(0o755)
    variables = {
        "DS_ENV_FILE": str(tmp_path / "environment"),
        "PDSH_SSH_ARGS_APPEND": SSH_PATIENCE,
        "PYTHON": str(tmp_path / "python"),
    }
    variables |= {
        "OMP_NUM_THREADS": "1",
        "SSH": "ssh -o BatchMode=yes -o ServerAliveInterval=6",
        "PYTHONPATH": str(ROOT),
    }

    def start(
        kind: str, slots: dict[str, int], recipe: dict[str, Any], log: str, *flags: str, program: Path = TRAIN
    ) -> list[subprocess.Popen[str]]:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (tmp_path / "hostfile").write_text("".join(f"{name} slots={count}\n" for name, count in slots.items()))
        words: list[object] = ["--config", tmp_path / "recipe.yaml", *flags]
        if kind == "deepspeed":
            command = [
                BIN / "deepspeed",
                "--hostfile",
                tmp_path / "hostfile",
                "--force_multi",
                "--enable_each_rank_log",
                tmp_path / log,
            ]
            return [
                hosts.start(next(iter(slots)), [*command, program, *words], tmp_path / f"{log}.launcher", **variables)
            ]
        if kind == "ssh.sh":  # from the last host
            command = ["launch/cluster/ssh.sh", tmp_path / "hostfile", *words]
            own = variables | {"PROGRAM": str(program)}
            return [hosts.start(list(slots)[-1], command, tmp_path / f"{log}.launcher", **own)]
        assert kind == "torchrun"
        command = [
            BIN / "torchrun",
            "--nnodes",
            len(slots),
            "--nproc_per_node",
            1,
            "--rdzv_backend",
            "c10d",
            "--rdzv_id",
            tmp_path.name,
        ]
        command += ["--rdzv_endpoint", f"{next(iter(slots))}:29400", "--log-dir", tmp_path / log, "--redirects", "3"]
        # A host's own address is what its name says, but only a fully qualified one convinces torchrun.
        return [
            hosts.start(
                name,
                [*command, "--local-addr", hosts.address(name), program, *words],
                tmp_path / f"{log}.{name}",
                **variables,
            )
            for name in slots
        ]

    yield start
    for name in hosts.names:  # a test that has failed would spoil the next
        hosts.kill(name)


def end(launchers: list[subprocess.Popen[str]], within: float) -> list[int]:
    deadline = time.monotonic() + within
    return [each.wait(max(0.1, deadline - time.monotonic())) for each in launchers]


def told(folder: Path) -> str:
    return "\n".join(
        f"== {file}\n{file.read_text()[-3000:]}"
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "log" in str(file)
    )


@pytest.mark.parametrize(
    ("kind", "slots"),
    [
        ("deepspeed", {"a": 2, "b": 1}),
        ("torchrun", {"a": 1, "b": 1, "c": 1}),
    ],
    ids=["deepspeed-2-1", "torchrun-1-1-1"],
)
def test_a_run_over_hosts_is_that_on_one_host(
    hosts: Hosts, launch: Any, base: Path, tmp_path: Path, kind: str, slots: dict[str, int]
) -> None:
    full_run(base, sum(slots.values()))
    recipe = json.loads((base / "recipe.json").read_text())
    recipe["run"] |= {"name": "run", "folder": str(tmp_path)}
    codes = end(launch(kind, slots, recipe, "log"), within=800)
    assert not any(codes), (codes, told(tmp_path))
    assert_is_that_on_one_host(base, tmp_path / "run", sum(slots.values()))
    assert "on host" not in told(tmp_path)
    assert [process for name in slots for process in hosts.processes(name)] == []


def test_the_demo_trains_over_three_hosts(hosts: Hosts, launch: Any, tmp_path: Path) -> None:
    """launch/recipes/demo.yaml itself, with models that are hardly trained and less of everything."""
    made = [sys.executable, "launch/prepare_demo.py", "--quick", "--out", tmp_path / "models"]
    subprocess.run(list(map(str, made)), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    recipe = yaml.safe_load(
        (ROOT / "launch/recipes/demo.yaml").read_text().replace("runs/demo-models", str(tmp_path / "models"))
    )
    recipe["run"]["folder"] = str(tmp_path / "one-host")
    recipe["rollout"] |= {"prompts_per_step": 24, "max_new_tokens": 96}
    recipe["stop"]["threshold"] |= {"capacity": 24, "min_entries": 8, "min_steps": 1}
    recipe["train"]["steps"], recipe["evaluation"]["limit"] = 3, 9
    train(3, recipe)
    flags = ("--run.folder", str(tmp_path / "hosts"))
    assert not any(end(launch("deepspeed", {"a": 1, "b": 1, "c": 1}, recipe, "log", *flags), within=800)), told(
        tmp_path
    )
    assert_same(tmp_path / "one-host/demo", tmp_path / "hosts/demo", 3)
    seen = records(tmp_path / "hosts/demo")
    assert any(record.get("stop/kat", 0) > 0 for record in seen), "no trap, no test of the rule"
    assert sum(any("avg@4" in key for key in record) for record in seen) == 2, seen


# The program of every rank: says which hosts share the teacher's shards.
WHO_SHARES = """
import json, runpy, socket
from pathlib import Path
from katds.parallel.world import World
block = World.block
def seen(self, size):
    found = block(self, size)
    (Path(__file__).parent / f"shares-{self.rank}").write_text(json.dumps(found.gather(socket.gethostname())))
    return found
World.block = seen
runpy.run_path("launch/train.py", run_name="__main__")
"""


def test_the_ranks_of_a_host_share_a_teacher(hosts: Hosts, launch: Any, base: Path, tmp_path: Path) -> None:
    """teacher.shard node: who shares it is on one host, and the run is that with a teacher that all share."""
    full_run(base, 4)
    recipe = json.loads((base / "recipe.json").read_text())
    recipe["run"] |= {"name": "run", "folder": str(tmp_path)}
    (tmp_path / "train.py").write_text(WHO_SHARES)
    launchers = launch(
        "ssh.sh", {"a": 2, "b": 2}, recipe, "log", "--teacher.shard", "node", program=tmp_path / "train.py"
    )
    assert not any(end(launchers, within=800)), told(tmp_path)
    shares = [json.loads((tmp_path / f"shares-{rank}").read_text()) for rank in range(4)]
    assert shares == [["a", "a"], ["a", "a"], ["b", "b"], ["b", "b"]]
    assert "shard: node" in (tmp_path / "run/config.yaml").read_text()
    assert_is_alike(base, tmp_path / "run", 4, of=4)


def until_checkpoint(folder: Path, launchers: list[subprocess.Popen[str]], seconds: float = 800) -> None:
    deadline = time.monotonic() + seconds
    while not (folder / "run/checkpoints/step-1/state.json").exists():
        assert time.monotonic() < deadline and all(each.poll() is None for each in launchers), told(folder)
        time.sleep(0.02)


def nothing_runs(hosts: Hosts, names: str, within: float, command: str = "") -> bool:
    """Nor with `command` in its command line."""
    deadline = time.monotonic() + within
    while any(command in line for name in names for line in hosts.processes(name)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.parametrize("kind", ["deepspeed", "torchrun"])
def test_a_host_that_vanishes_ends_the_run_which_goes_on_without_it(
    hosts: Hosts, launch: Any, base: Path, tmp_path: Path, kind: str
) -> None:
    """The last of three hosts. (Its own torchrun waits minutes for the store on host a.)"""
    recipe = losing_recipe(base, tmp_path)
    launchers = launch(kind, {"a": 1, "b": 1, "c": 1}, recipe, "log")
    until_checkpoint(tmp_path, launchers)
    hosts.unplug("c")
    try:
        if kind == "torchrun":
            assert all(end(launchers[:2], within=20 * LOST_AFTER)), told(tmp_path)
            assert nothing_runs(hosts, "c", within=2 * LOST_AFTER, command="-u launch/train.py"), hosts.processes("c")
            hosts.kill("c")
        else:
            assert end(launchers, within=10 * LOST_AFTER)[0] != 0, told(tmp_path)
        assert nothing_runs(hosts, "abc", within=2 * LOST_AFTER), [hosts.processes(name) for name in "abc"]
    finally:
        hosts.plug_in("c")
    pattern = "*_rank{rank}.log" if kind == "deepspeed" else "**/0/stderr.log"
    logs = {}
    for rank, host in enumerate("abc"):
        found = list((tmp_path / "log").glob(pattern.format(rank=rank)))
        logs[host] = next(log for log in found if f"error on host {host} " in log.read_text())
    assert_all_know_of_c(logs, tmp_path)
    assert not any(end(launch(kind, {"a": 1, "b": 1}, recipe, "log-again"), within=800)), told(tmp_path)
    assert_is_alike(base, tmp_path / "run", 2)


def test_the_host_of_rank_0_may_vanish_as_well(hosts: Hosts, launch: Any, base: Path, tmp_path: Path) -> None:
    """It holds the store that the others' beats go through; they say so. (With ssh.sh what it says itself has no way to the host where it
    was started. torchrun's own agents wait minutes for a store that is gone, after the ranks have ended.)"""
    recipe = losing_recipe(base, tmp_path)
    launchers = launch("ssh.sh", {"a": 1, "b": 1}, recipe, "log")
    until_checkpoint(tmp_path, launchers)
    hosts.unplug("a")
    try:
        codes = end(launchers, within=20 * LOST_AFTER)
        assert all(codes), (codes, told(tmp_path))
        assert nothing_runs(hosts, "ab", within=4 * LOST_AFTER), [hosts.processes(name) for name in "ab"]
    finally:
        hosts.plug_in("a")
    said = told(tmp_path)
    assert "error on host b (rank 1): host a (rank 0), which leads the run, has been silent since" in said, said
    assert not any(end(launch("ssh.sh", {"b": 1}, recipe, "log-again"), within=800)), told(tmp_path)
    assert_is_alike(base, tmp_path / "run", 1)


def lives(pid: str) -> bool:
    """What is dead may wait for whatever is the machine's first process to look after it."""
    try:
        return re.search(r"State:\s[ZX]", Path(f"/proc/{pid}/status").read_text()) is None
    except OSError:
        return False


def test_nothing_is_left_of_hosts_that_were_not_closed() -> None:
    """Neither processes nor devices nor files, whether they run something or not."""
    if reason := missing():
        pytest.skip(reason)
    crashed = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\nfrom hosts import Hosts\nh = Hosts('ab')\nh.open()\n"
        "h.start('a', ['sleep', '600'])\nprint(h.folder, *h._inits.values(), flush=True)\nos._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", crashed, str(Path(__file__).parent)], capture_output=True, text=True)
    folder, *pids = done.stdout.split()
    assert Path(folder).exists() and all(Path(f"/proc/{pid}").exists() for pid in pids), done.stderr
    with Hosts("a") as one:
        assert not Path(folder).exists()
        deadline = time.monotonic() + 20  # it has been killed, which takes as long as the machine is busy
        while any(map(lives, pids)):
            assert time.monotonic() < deadline, [Path(f"/proc/{pid}/status").read_text() for pid in filter(lives, pids)]
            time.sleep(0.05)
        assert one.start("a", ["hostname", "-I"]).communicate(timeout=30)[0].split() == [one.address("a")]
        tag = one.tag
    left = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    assert f"kds{tag}" not in left and Path(folder).name.replace("-", "") not in left


# Ends a process that makes hosts where little of them is there: with a folder and a bridge, or in the midst of trying.
ENDS_EARLY = {
    "bridge": "hosts.Hosts._add = lambda *_: os._exit(1)\nhosts.Hosts('ab').open()",
    "try": "hosts.UNSHARE = ('sh', '-c', 'kill -9 $PPID; exec sleep 600')\nhosts.missing()",
}


@pytest.mark.parametrize("end", ENDS_EARLY)
def test_nothing_is_left_of_what_had_hardly_begun(end: str) -> None:
    if reason := missing():
        pytest.skip(reason)
    command = f"import os, sys; sys.path.insert(0, sys.argv[1])\nimport hosts\n{ENDS_EARLY[end]}"
    killed = subprocess.Popen([sys.executable, "-c", command, str(Path(__file__).parent)])
    assert killed.wait(60), "it was not killed"
    left = traces(killed.pid)
    assert left and any(name.startswith("sleep") for name in left) == (end == "try"), left
    remove_abandoned()
    assert not traces(killed.pid)


def traces(process: int) -> list[str]:
    """Namespaces, what runs in them, network devices and folders that this process has made."""
    made = re.compile(rf"kds-?{process}x")
    namespaces = [name for name in os.listdir("/run/netns") if made.match(name)]
    running = [pid for name in namespaces for pid in run("ip", "netns", "pids", name).split()]
    others = [*os.listdir("/sys/class/net"), *os.listdir(tempfile.gettempdir())]
    commands = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in running]
    return [*namespaces, *commands, *filter(made.match, others)]


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
