"""launch/cluster: what the scripts start, how signals travel, and what a scheduler is told. Stand-ins for srun, scontrol and ssh start
real processes here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from linters import assert_clean

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "launch/cluster"
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
# A rank: says who it is and what it was told, and leaves on a signal as a run does.
RANK = """
import json, os, signal, sys, time
def leave(number, frame):
    open(f"{os.environ['OUT']}/heard-{os.environ['RANK']}", "w").write(signal.Signals(number).name)
    if os.environ.get("SLOW_RANK", os.environ["RANK"]) == os.environ["RANK"]:
        time.sleep(float(os.environ.get("SLOW", 0)))
    for stream in (sys.stdout, sys.stderr) * int(os.environ.get("LINES", 0)):
        print("a step", file=stream, flush=True)
        time.sleep(0.02)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGUSR1, leave)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
place = f"{os.environ['OUT']}/rank-{os.environ['RANK']}"
open(place + ".new", "w").write(json.dumps([{name: os.environ[name] for name in names}, sys.argv[1:], os.getpid()]))
os.rename(place + ".new", place)
if os.environ["RANK"] == os.environ.get("FAILING"):
    time.sleep(float(os.environ.get("FAILS_AFTER", 0)))
    sys.exit(3)
if "MISSING" in os.environ:
    sys.exit(69)
time.sleep(float(os.environ.get("SECONDS_TO_LIVE", 60)))
"""
# Starts the command on each of NODES nodes, passes signals on, and returns the highest code. Ends the other nodes as srun does: at once
# where one fails and --kill-on-bad-exit=1 is given, else when the seconds of --wait have passed since the first one's end.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
words = sys.argv[[word.startswith("--") for word in sys.argv[1:]].index(False) + 1 :]
open(os.environ["OUT"] + "/srun", "w").write(" ".join(sys.argv[1:]))
nodes = [subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": str(i)}}) for i in range(int(os.environ["NODES"]))]
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: [node.send_signal(number) for node in nodes])
given = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
patience, ended = float(given.get("wait", 0)) * float(os.environ.get("SRUN_SECOND", 1)) or 1e9, None
while any(node.poll() is None for node in nodes):
    codes = [node.poll() for node in nodes]
    if ended is None and any(code is not None for code in codes):
        ended = time.monotonic()
    if (given["kill-on-bad-exit"] == "1" and any(codes)) or (ended is not None and time.monotonic() > ended + patience):
        [node.kill() for node in nodes]
    time.sleep(0.05)
sys.exit(max(code if (code := node.wait()) >= 0 else 128 - code for node in nodes))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") echo localhost; echo second ;;
"show job") echo "${JOB_IS:-JobState=RUNNING Reason=None}" ;;
requeue*) echo "$2" >>"$OUT/requeued" ;;
esac
"""
SSH = """#!/bin/bash
echo $$ >"$OUT/ssh-$1"
exec bash -c "$2"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Programs that stand in for those of a cluster, and a program whose ranks tell what they see."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("my-ssh", SSH)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "rank.py").write_text(RANK)
    return tmp_path


def environment(place: Path, **more: str) -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RANK", "LOCAL_", "WORLD_", "MASTER_", "SLURM"))
    }
    return kept | {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "OUT": str(place), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
    } | more  # fmt: skip


def begin(place: Path, *command: str | Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, env=environment(place, **more), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


def ranks(place: Path, count: int) -> list[Any]:
    """[environment, arguments, process] of each rank, once all are there."""
    until(lambda: len([path for path in place.glob("rank-*") if path.suffix != ".new"]) == count)
    return [json.loads((place / f"rank-{rank}").read_text()) for rank in range(count)]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()


@pytest.fixture
def node(place: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
        started.append(begin(place, CLUSTER / "node.sh", place / "rank.py", *arguments, **more))
        return started[-1]

    yield start
    for each in started:
        if each.poll() is None:
            os.killpg(each.pid, signal.SIGKILL)


def test_a_node_starts_its_ranks(place: Path, node: Any) -> None:
    first = node(
        "--a",
        "b c",
        NODES="2",
        NODE_RANK="1",
        RANKS_PER_NODE="2",
        MASTER_ADDR="first",
        MASTER_PORT="7",
        SECONDS_TO_LIVE="0",
    )
    assert first.wait(60) == 0
    for rank in (2, 3):
        seen, arguments, _ = json.loads((place / f"rank-{rank}").read_text())
        assert seen == {
            "RANK": str(rank), "LOCAL_RANK": str(rank - 2), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "first",
            "MASTER_PORT": "7",
        }  # fmt: skip
        assert arguments == ["--a", "b c"]


@pytest.mark.parametrize(("sent", "heard"), [("TERM", "SIGTERM"), ("USR1", "SIGUSR1"), ("INT", "SIGTERM")])
def test_signals_reach_every_rank_and_are_waited_for(place: Path, node: Any, sent: str, heard: str) -> None:
    process = node(RANKS_PER_NODE="2", SLOW="1.5")
    ranks(place, 2)
    process.send_signal(getattr(signal, f"SIG{sent}"))
    assert process.wait(60) == 75
    assert {(place / f"heard-{rank}").read_text() for rank in (0, 1)} == {heard}


def test_a_second_interrupt_does_not_wait(place: Path, node: Any) -> None:
    process = node(RANKS_PER_NODE="2", SLOW="60")
    started = ranks(place, 2)
    process.send_signal(signal.SIGINT)
    until(lambda: len(list(place.glob("heard-*"))) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert not any(alive(pid) for *_, pid in started)


def test_a_rank_that_fails_ends_its_node(place: Path, node: Any) -> None:
    process = node(RANKS_PER_NODE="3", FAILING="1", PATIENCE_SECONDS="0")
    assert process.wait(60) == 3
    assert not any(alive(pid) for *_, pid in ranks(place, 3))


@pytest.mark.parametrize(("late", "code"), [("1", 3), ("20", 69)])
def test_a_node_tells_the_cause(place: Path, node: Any, late: str, code: int) -> None:
    """Ranks that miss a peer may leave before the one that has failed; who stays longer than that may have no cause to tell."""
    process = node(
        RANKS_PER_NODE="2",
        MISSING="1",
        FAILING="1",
        FAILS_AFTER=late,
        PATIENCE_SECONDS="4",
        CODE_FILE=str(place / "code"),
    )
    assert process.wait(18) == code
    assert (place / "code").read_text() == f"{code}\n"
    assert not any(alive(pid) for *_, pid in ranks(place, 2))


@pytest.mark.parametrize(("sent", "code"), [("TERM", 75), ("USR1", 75), ("KILL", 137)])
def test_a_rank_that_is_asked_to_leave_before_it_listens(place: Path, node: Any, sent: str, code: int) -> None:
    """KILL: the rank's alone, nobody has asked."""
    (place / "rank.py").write_text(
        f"import os, time\nopen({str(place / 'deaf')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    process = node()
    until(lambda: (place / "deaf").exists() and (place / "deaf").read_text())
    target = int((place / "deaf").read_text()) if sent == "KILL" else process.pid
    os.kill(target, getattr(signal, f"SIG{sent}"))
    assert process.wait(60) == code


def test_a_rank_may_speak_when_the_connection_is_lost(place: Path) -> None:
    """As sshd ends a command whose connection is gone: nobody reads what it says any more, and its input ends."""
    process = subprocess.Popen(
        [CLUSTER / "node.sh", place / "rank.py"], cwd=ROOT, env=environment(place, RANKS_PER_NODE="2", SIGNALS_FROM_STDIN="1", LINES="9"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    ranks(place, 2)
    for stream in (process.stdout, process.stderr, process.stdin):
        assert stream is not None
        stream.close()
    assert process.wait(60) == 75
    assert {(place / f"heard-{rank}").read_text() for rank in (0, 1)} == {"SIGTERM"}


def test_a_node_says_what_it_lacks(place: Path) -> None:
    mistakes: list[tuple[dict[str, str], list[str], str]] = [
        ({}, [], "there is no program"),
        ({"NODES": "2"}, ["x"], "MASTER_ADDR is not set"),
        ({"RANKS_PER_NODE": "0"}, ["x"], "RANKS_PER_NODE is '0'"),
        ({"PATIENCE_SECONDS": "0.1"}, ["x"], "PATIENCE_SECONDS is '0.1'"),
        ({"NODES": "two"}, ["x"], "NODES is 'two'"),
        ({"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, ["x"], "NODE_RANK is '2', with NODES=2"),
    ]
    for more, arguments, piece in mistakes:
        process = begin(place, CLUSTER / "node.sh", *arguments, **more)
        assert process.wait(60) == 2 and process.stderr is not None and piece in process.stderr.read()


def slurm(place: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    job = {
        "SLURM_JOB_ID": "417",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    own = {"HOSTFILE": str(place / "hosts"), "RANKS_PER_NODE": "1"}
    return begin(place, CLUSTER / "slurm.sh", *arguments, **job | own | more)


def test_slurm_saves_and_queues_again(place: Path) -> None:
    process = slurm(place, "--x", "1", PROGRAM=str(place / "rank.py"))
    seen = ranks(place, 2)
    assert (place / "hosts").read_text() == "localhost slots=1\nsecond slots=1\n"
    assert [each["MASTER_ADDR"] for each, *_ in seen] == ["localhost"] * 2
    assert [each["MASTER_PORT"] for each, *_ in seen] == ["20417"] * 2 and seen[0][1] == ["--x", "1"]
    assert "--cpus-per-task=2" in (place / "srun").read_text()
    os.killpg(process.pid, signal.SIGUSR1)  # Slurm tells all processes of the job
    assert process.wait(60) == 75
    assert (place / "requeued").read_text() == "417\n"
    failed = slurm(place, PROGRAM=str(place / "rank.py"), FAILING="0", PATIENCE_SECONDS="0", SECONDS_TO_LIVE="1")
    assert failed.wait(60) == 3
    assert (place / "requeued").read_text() == "417\n", "a failure is not tried again"


def test_slurm_waits_for_the_last_node_to_leave(place: Path) -> None:
    process = slurm(place, PROGRAM=str(place / "rank.py"), SLOW="3", SLOW_RANK="1")
    ranks(place, 2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
    assert (place / "requeued").read_text() == "417\n"


def test_slurm_ends_the_other_nodes_when_one_fails(place: Path) -> None:
    process = slurm(place, PROGRAM=str(place / "rank.py"), FAILING="0", SECONDS_TO_LIVE="60", SRUN_SECOND="0.02")
    started = ranks(place, 2)
    assert process.wait(30) not in (0, 75)
    os.killpg(process.pid, signal.SIGKILL)  # what Slurm's own daemon does with the processes of a task
    until(lambda: not any(alive(pid) for *_, pid in started))
    assert not (place / "requeued").exists()


@pytest.mark.parametrize(
    ("job", "again"),
    [
        ("JobState=RUNNING Reason=None PreemptTime=None", True),
        ("JobState=COMPLETING Reason=TimeLimit PreemptTime=None", True),
        (
            "JobState=COMPLETING Reason=None PreemptTime=2026-11-28T07:05:27",
            False,
        ),  # scancel while the preempted job saved
        ("JobState=COMPLETING Reason=None PreemptTime=None", False),  # scancel
    ],
)
def test_slurm_queues_again_whom_nobody_has_cancelled(place: Path, job: str, again: bool) -> None:
    process = slurm(place, PROGRAM=str(place / "rank.py"), MISSING="1", JOB_IS=job)
    assert process.wait(60) == 69
    assert (place / "requeued").exists() == (place / "hosts.losses").exists() == again


def test_slurm_tells_a_cause_from_those_that_miss_it(place: Path) -> None:
    """srun says the largest of all codes, which is that of those that have lost others."""
    process = slurm(place, PROGRAM=str(place / "rank.py"), MISSING="1", FAILING="1")
    assert process.wait(60) == 3
    assert not (place / "requeued").exists()


def test_slurm_queues_again_for_lost_nodes_but_not_for_ever(place: Path) -> None:
    for restart in range(3):
        more = {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        process = slurm(place, PROGRAM=str(place / "rank.py"), MISSING="1", LOSSES="2", **more)
        assert process.wait(60) == 69
        assert (place / "requeued").read_text() == "417\n" * min(restart + 1, 2)
    assert process.stderr is not None and "nodes are lost, 3 times" in process.stderr.read()
    process = slurm(place, PROGRAM=str(place / "rank.py"), MISSING="1", LOSSES="2")
    assert process.wait(60) == 69
    assert (place / "requeued").read_text() == "417\n" * 3, "another job, with a number that was in use before"


def test_slurm_goes_by_srun_where_containers_do_not_share_its_folder(place: Path) -> None:
    (place / "rank.py").write_text(
        f"import os, shutil\nshutil.rmtree({str(place / 'hosts.codes')!r}, True)\nos._exit(75)"
    )
    process = slurm(place, PROGRAM=str(place / "rank.py"))
    assert process.wait(60) == 75
    assert (place / "requeued").read_text() == "417\n"


def ssh(place: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    (place / "hosts").write_text("# two\nlocalhost slots=2\n\nsecond slots=2")  # the last line has no end
    own = {"SSH": str(place / "bin/my-ssh"), "PROGRAM": str(place / "rank.py")}
    return begin(place, CLUSTER / "ssh.sh", place / "hosts", *arguments, **own | more)


def test_ssh_starts_every_host(place: Path) -> None:
    process = ssh(place, "--a", "b 'c'", SECONDS_TO_LIVE="0.5")
    seen = ranks(place, 4)
    assert [each["LOCAL_RANK"] for each, *_ in seen] == ["0", "1", "0", "1"]
    assert all(each["WORLD_SIZE"] == "4" and each["MASTER_ADDR"] == "localhost" for each, *_ in seen)
    assert seen[3][1] == ["--a", "b 'c'"]
    assert process.wait(60) == 0


def test_ssh_passes_variables_on(place: Path) -> None:
    (place / "bin/my-ssh").write_text('#!/bin/bash\nexec env -i PATH="$PATH" bash -c "$2"\n')
    (place / "rank.py").write_text(
        f"import json, os\njson.dump(dict(os.environ), open(f'{place}/rank-' + os.environ['RANK'], 'w'))\n"
    )
    given = {
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "e 'x'",
        "OMP_NUM_THREADS": "3",
        "MY_OWN": "a $b",
        "OTHER": "x",
    }
    assert ssh(place, EXPORT="MY_OWN", **given).wait(60) == 0
    for own in range(4):
        seen = json.loads((place / f"rank-{own}").read_text())
        assert {name: seen.get(name) for name in given} == given | {"OTHER": None}
    for name, why in (
        ("NOT_SET", "EXPORT names NOT_SET, which is not set"),
        ("A,B", "EXPORT has 'A,B', which is no name"),
    ):
        process = ssh(place, EXPORT=name)
        assert process.wait(60) == 2 and process.stderr is not None and why in process.stderr.read()


@pytest.mark.parametrize("end", ["TERM", "lost"])
def test_ssh_leaves_nothing_behind(place: Path, end: str) -> None:
    process = ssh(place)
    started = ranks(place, 4)
    if end == "TERM":
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    else:  # this machine goes away, and with it its ends of the connections
        process.kill()
    until(lambda: not any(alive(pid) for *_, pid in started))
    assert len(list(place.glob("heard-*"))) == 4


def test_ssh_ends_the_other_hosts_when_one_fails(place: Path) -> None:
    process = ssh(place, FAILING="3", PATIENCE_SECONDS="0", SLOW="60")
    assert process.wait(60) == 3
    until(lambda: not any(alive(pid) for *_, pid in ranks(place, 4)))


@pytest.mark.parametrize("first", ["75", "69"])
def test_ssh_leaves_with_the_cause(place: Path, first: str) -> None:
    """Of three hosts one leaves first, saved or because it misses another, and one that fails after it; the third waits for them."""
    codes = {"a": (first, "0"), "b": ("3", "2"), "c": ("0", "60")}
    script = "".join(f"[ $1 = {name} ] && sleep {pause} && exit {code}\n" for name, (code, pause) in codes.items())
    (place / "bin/my-ssh").write_text(
        f"#!/bin/bash\ntrap 'exit 9' TERM\n[ $1 = c ] && read -r said && exit 137\n{script}"
    )
    (place / "hosts").write_text("".join(f"{name} slots=1\n" for name in codes))
    began = time.monotonic()
    process = begin(place, CLUSTER / "ssh.sh", place / "hosts", SSH=str(place / "bin/my-ssh"), PATIENCE_SECONDS="4")
    assert process.wait(60) == 3 and 4 <= time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("a 8\n", "has no slots"),
        ("a slots=\n", "has no slots"),
        ("a slots=0\n", "has no slots"),
        ("a slots=8\nb slots=4\n", "different slots"),
        ("# none\n", "names no host"),
        (None, "no readable HOSTFILE"),
    ],
)
def test_hostfiles_that_cannot_be(place: Path, text: str | None, piece: str) -> None:
    if text is not None:
        (place / "bad").write_text(text)
    process = begin(place, CLUSTER / "ssh.sh", place / "bad")
    assert process.wait(60) == 2 and process.stderr is not None and piece in process.stderr.read()


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "docker/katds"], ids=lambda path: path.name)
def test_variables_are_documented(script: Path) -> None:
    text = script.read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    read = set(re.findall(r"\$\{([A-Z_]+)(?::?[-=])", text))
    assert read, "the pattern finds nothing"
    for name in read - {name for name in read if name.startswith("SLURM_")}:
        assert re.search(rf"\b{name}\b", head), f"{name} is read but not documented in {script.name}"


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_shell_is_clean(script: Path) -> None:
    assert_clean("shellcheck", script)
    assert os.access(script, os.X_OK), "not executable"


def test_kubernetes_example() -> None:
    service, job = yaml.safe_load_all((CLUSTER / "k8s.yaml").read_text())
    spec, (container,) = job["spec"], job["spec"]["template"]["spec"]["containers"]
    given = {each["name"]: each.get("value") for each in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(given["NODES"])
    assert int(given["RANKS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    name, domain = job["metadata"]["name"], spec["template"]["spec"]["subdomain"]
    assert given["MASTER_ADDR"] == f"{name}-0.{domain}" and service["metadata"]["name"] == domain
    assert service["spec"]["selector"] == {"job-name": name} and given["NODE_RANK"] is None
    assert spec["successPolicy"]["rules"] == [{"succeededIndexes": "0"}], "rank 0 writes what is left of a run"
    for path in (*container["command"], container["args"][1]):
        assert (ROOT / path).exists(), path
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    for version in ("1.31", "1.33"):  # the oldest that the file names, and one more
        for document in (service, job):
            validate(document, version, strict=True)


def what_a_job_does(spec: Any, code: int, disrupted: bool = False) -> str:
    """The first rule that fits decides; none: the pod counts (https://kubernetes.io/docs/concepts/workloads/controllers/job)."""
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes is not None and codes["operator"] == "In" and code in codes["values"]:
            return str(rule["action"])
        if disrupted and {"type": "DisruptionTarget", "status": "True"} in rule.get("onPodConditions", []):
            return str(rule["action"])
    return "Count"


@pytest.mark.parametrize(
    ("ends", "counted"),
    [
        ([75] * 8, 0),  # evicted: all save
        ([1] + [69] * 7, 1),  # one has crashed, the others miss it
        ([137] + [69] * 7, 1),  # its memory was too small
        ([69] * 8, 0),  # one was cut off
        ([139, 139] + [69] * 6, 2),
    ],
)
def test_kubernetes_counts_crashes_and_not_pods(ends: list[int], counted: int) -> None:
    _, job = yaml.safe_load_all((CLUSTER / "k8s.yaml").read_text())
    assert sum(what_a_job_does(job["spec"], code) == "Count" for code in ends) == counted
    assert what_a_job_does(job["spec"], 2) == "FailJob", "a mistake in the recipe"
    assert what_a_job_does(job["spec"], 137, disrupted=True) == "Ignore", "killed while its node was drained"
