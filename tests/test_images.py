"""docker/: the files are clean and documented, and the CPU image's steps work in a clean root."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from linters import assert_clean

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "docker/Dockerfile", ROOT / "docker/Dockerfile.cpu"]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """(FROM, ...), (RUN, ...), ...: without comments, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        yield name, rest.strip()


@each_file
def test_files_are_clean(path: Path) -> None:
    assert_clean("hadolint", path)


@each_file
def test_build_arguments_are_documented(path: Path) -> None:
    head = path.read_text().partition("\nARG")[0]
    arguments = {rest.partition("=")[0]: rest.partition("=")[2] for name, rest in instructions(path) if name == "ARG"}
    assert {"BASE"} < arguments.keys()
    for name, default in arguments.items():
        said = re.search(rf"^#   {name} \((.*?)\)", head, re.MULTILINE)
        assert said, f"{name} is not documented"
        assert "://" in default or said[1] == default.strip('"'), f"the default of {name} is {default}, not {said[1]}"


@each_file
def test_the_image_holds_what_it_needs_and_is_not_root(path: Path) -> None:
    given = list(instructions(path))
    for sources in (shlex.split(rest)[1:-1] for name, rest in given if name == "COPY"):
        assert all((ROOT / source).exists() for source in sources), sources
    names = [name for name, _ in given]
    assert [rest for name, rest in given if name == "USER"] == ["1000"]
    assert names.index("USER") < names.index("COPY"), "nothing of the package is installed by root"
    assert {"HEALTHCHECK", "ENTRYPOINT"} <= set(names)


def test_the_lock_of_cuda_goes_with_the_constraints() -> None:
    lines = [line for line in (ROOT / "docker/cuda.lock").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    constraints = dict(re.findall(r"^([^#=]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pinned["torch"] == constraints["torch"], "read anew which CUDA packages this torch wants"
    assert not pinned.keys() & constraints.keys() - {"torch"}
    base = next(rest for name, rest in instructions(FILES[0]) if name == "ARG")
    assert base.startswith("BASE=nvidia/cuda:" + ".".join(pinned["cuda-toolkit"].split(".")[:3])), (
        "another CUDA than torch's"
    )


def test_the_entry_point_explains_itself() -> None:
    program = ROOT / "docker/katds"
    text = subprocess.run([program, "help"], capture_output=True, text=True, check=True).stdout
    assert "katds train --config" in text and "set -euo" not in text
    done = subprocess.run([program, "fly"], capture_output=True, text=True)
    assert done.returncode == 2 and "'fly' is not a program" in done.stderr
    assert_clean("shellcheck", program)


def test_every_program_of_launch_is_one_of_the_image() -> None:
    text = (ROOT / "docker/katds").read_text()
    (named,) = re.findall(r"^(.*)\) exec \.venv/bin/python", text, re.MULTILINE)
    (of_ranks,) = re.findall(r"^(.*)\)\n\tneed_gpu\n\texec launch/cluster/node\.sh", text, re.MULTILINE)
    assert {f"{name}.py" for name in f"{named} | {of_ranks}".split(" | ")} == {
        path.name for path in (ROOT / "launch").glob("*.py")
    }
    assert f"katds {named} ..." in text, "it is not explained"


@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_health_counts_on_gpus(tmp_path: Path, gpus: int) -> None:
    """As the GPU image asks, of a machine whose GPUs are listed one after the other; the demo's two ranks have one each."""
    place = tmp_path / "opt"
    (place / "docker").mkdir(parents=True)
    shutil.copy(ROOT / "docker/katds", place / "docker")
    (place / ".venv/bin").mkdir(parents=True)
    (place / ".venv/bin/python").symlink_to("/bin/true")
    lister = tmp_path / "nvidia-smi"
    lister.write_text(
        f'#!/bin/bash\nfor ((i = 0; i < {gpus}; i++)); do echo "GPU $i: NVIDIA H200" || exit 1; sleep 0.05; done\n'
    )
    lister.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KATDS_NEEDS_GPU": "1"}
    node = place / "launch/cluster/node.sh"
    node.parent.mkdir(parents=True)
    node.write_text('#!/bin/sh\necho "${RANKS_PER_NODE:-all} ranks"\n')
    node.chmod(0o755)
    ranks = {"health": "", "train": "all ranks\n", "evaluate": "all ranks\n", "demo": f"{min(gpus, 2)} ranks\n"}
    for program, started in ranks.items():
        done = subprocess.run([place / "docker/katds", program], capture_output=True, text=True, env=environment)
        assert (done.returncode == 0) == (gpus > 0), done.stderr
        assert done.stdout == started if gpus else "there is no GPU" in done.stderr


ROOT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Where packages come from, as a build's own arguments would say.
PASSED = {
    key: value for key, value in os.environ.items() if re.fullmatch("PIP_(EXTRA_)?INDEX_URL|(?i:https?|no)_proxy", key)
}


@dataclass
class CleanRoot:
    """Does what a Dockerfile says in a folder with a root file system, by chroot."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: PASSED | {"PATH": ROOT_PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    place: str = "/"
    user: str = "0"
    entry: list[str] = field(default_factory=list)

    def follow(self, path: Path, overrides: dict[str, str]) -> None:
        for name, rest in instructions(path):
            if name == "ARG":
                key, _, value = rest.partition("=")
                self.arguments[key] = overrides.get(key, value.strip('"'))
            elif name == "ENV":
                self.environment |= dict(word.split("=", 1) for word in shlex.split(rest))
            elif name == "WORKDIR":
                self.place = rest
            elif name == "USER":
                self.user = rest
            elif name == "RUN":
                self.run(["/bin/sh", "-c", rest], self.arguments)
            elif name == "COPY":
                self.copy(rest)
            elif name == "ENTRYPOINT":
                self.entry = json.loads(rest)
            else:
                assert name in ("FROM", "HEALTHCHECK", "CMD"), name

    def copy(self, rest: str) -> None:
        owner, *sources, target = shlex.split(rest)
        assert owner == "--chown=katds:katds"
        for source in sources:
            inside = self.root / self.place.strip("/") / target
            place = inside / Path(source).name if target.endswith("/") else inside
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, place)
            top = self.root / self.place.strip("/") / Path(target).parts[0] if target != "./" else place
            subprocess.run(["chown", "-R", "1000:1000", str(top)], check=True)

    def run(self, command: list[str], more: dict[str, str] | None = None) -> str:
        settings = self.environment | (more or {}) | {"HOME": "/root" if self.user == "0" else "/home/katds"}
        inside = [
            "env",
            "-i",
            *(f"{key}={value}" for key, value in settings.items()),
            "sh",
            "-c",
            'cd "$0" && exec "$@"',
            self.place,
        ]
        # As a container has them; both go with the mount namespace.
        mounts = 'mount -t proc proc "$0/proc" && mount -t tmpfs -o mode=1777 tmpfs "$0/dev/shm"'
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-c", f'{mounts} && exec chroot "$@"', str(self.root),
             f"--userspec={self.user}:{self.user}", str(self.root), *inside, *command],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


def make_root(root: Path) -> dict[str, str]:
    """Debian 12, with this machine's resolver and certificates. Returns build arguments: PyTorch comes from a package index in the
    root that holds the wheel which pip finds here."""
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", "bookworm", root],
        capture_output=True,
        text=True,
        env=os.environ | SBIN,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    own = root / "usr/local/share/ca-certificates"  # which the package ca-certificates adds to its own
    own.mkdir(parents=True)
    for certificate in Path("/usr/local/share/ca-certificates").glob("**/*.crt"):
        shutil.copy(certificate, own)
    (root / "etc/pip.conf").write_text("[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n")
    (torch,) = re.findall("^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    wheels = root / "index/torch"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.11",
    ]
    subprocess.run([*pip, f"--dest={wheels}", torch], check=True)
    for folder in (wheels, wheels.parent):
        links = "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in folder.iterdir())
        (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>\n{links}</body></html>\n")
    return {"TORCH_INDEX": "file:///index"}


SBIN = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_cpu_image_s_steps_work_in_a_clean_root(tmp_path: Path) -> None:
    """With KATDS_CLEAN_ROOT=1, as it takes minutes and some GB; needs root and the Debian package debootstrap."""
    if "KATDS_CLEAN_ROOT" not in os.environ or os.geteuid() != 0:
        pytest.skip("needs root, debootstrap, and KATDS_CLEAN_ROOT=1: it takes minutes")
    tried = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"namespaces cannot be made here ({tried.stderr.strip()})")
    root = tmp_path / "root"
    root.mkdir(mode=0o755)
    image = CleanRoot(root)
    try:
        follow_and_use(image)
    finally:
        shutil.rmtree(root)  # 3 GB


def follow_and_use(image: CleanRoot) -> None:
    image.follow(FILES[1], make_root(image.root))
    image.arguments = {}
    assert image.run([*image.entry, "health"]).startswith("katds ")
    flags = {
        "train.steps": "2",
        "rollout.prompts_per_step": "8",
        "rollout.max_new_tokens": "64",
        "evaluation.limit": "2",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    config = ["--config", "launch/recipes/demo.yaml"]
    assert "2 steps on 2 ranks" in image.run([*image.entry, "demo", *words], {"HF_HUB_OFFLINE": "1"})
    words += ["--run.name", "one", "--run.resume", "auto"]
    assert "2 steps on 1 rank" in image.run([*image.entry, "train", *config, *words])
    table = image.run([*image.entry, "evaluate", *config, "--evaluation.limit", "2", "--student.path", "runs/demo"])
    assert "| eval " in table and "results.json" in table
