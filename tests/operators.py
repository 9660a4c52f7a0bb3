"""DeepSpeed's compiled operators, for the tests of offload.

`python tests/operators.py [BUILDER ...]` compiles them, once per virtual environment and outside of any test: CPUAdamBuilder takes a
minute or two, AsyncIOBuilder (NVMe) six on two cores; and a build that a test's time limit ends leaves a lock behind, for which the
next would wait for ever.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

NAMES = {"CPUAdamBuilder": "cpu_adam", "AsyncIOBuilder": "async_io"}


def need(*builders: str) -> None:
    """Skips a test whose operators are not compiled; fails it where KATDS_OPERATORS names them."""
    for builder in builders:
        if not _compiled(NAMES[builder]):
            assert builder not in os.environ.get("KATDS_OPERATORS", ""), f"DeepSpeed's {builder} is not compiled"
            pytest.skip(
                f"DeepSpeed's {NAMES[builder]} is not compiled; run: python tests/operators.py {builder} (needs g++ and libaio-dev)"
            )


def _compiled(name: str) -> bool:
    """From the sources that are installed here: DeepSpeed would compile another environment's anew, in the middle of a test."""
    import deepspeed
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(name, verbose=False))
    plan = folder / "build.ninja"
    return (
        (folder / f"{name}.so").exists() and plan.exists() and str(Path(deepspeed.__file__).parent) in plan.read_text()
    )


def build(builders: list[str]) -> None:
    from deepspeed.ops import op_builder

    for builder in builders or NAMES:
        getattr(op_builder, builder)().load(verbose=False)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    build(sys.argv[1:])
