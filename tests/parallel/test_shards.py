"""A frozen model in blocks of ranks has the weights of its folder, and is never whole while it is loaded."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero import partition_parameters
from ranks import run_ranks
from test_view import VOCABULARY, packed
from transformers import AutoModelForCausalLM
from zoo import deepspeed_json, random_model

from katds.errors import ConfigError
from katds.parallel.shards import block_size
from katds.parallel.world import start_world
from katds.parallel.zero import load_frozen

RANKS = 4


def config(dtype: str = "float32") -> dict[str, Any]:
    return deepspeed_json() | ({"bf16": {"enabled": True}} if dtype == "bfloat16" else {})


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def weights_on_rank(path: Path, dtype: str) -> None:
    world = start_world()
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    expected = state(plain)
    whole = load_frozen(path, config(dtype), VOCABULARY)
    for size in (2, 1):
        teacher = load_frozen(path, config(dtype), VOCABULARY, block=world.block(size).group)
        parameters = list(teacher.engine.module.parameters())
        assert teacher.ranks == size and whole.ranks == RANKS
        assert {p.ds_process_group.size() for p in parameters} == {size}
        assert all(p.data.numel() == 0 and not p.requires_grad for p in parameters)
        assert [p.ds_tensor.numel() for p in parameters] == [-(-p.ds_numel // size) for p in parameters]
        with teacher.decoding() as model:
            mine = state(model.model)
            places = [each.weight.data_ptr() for each in (model.head, model.model.get_input_embeddings())]
            assert (len(set(places)) == 1) == plain.config.tie_word_embeddings
        assert mine.keys() == expected.keys()
        for name, value in expected.items():
            assert mine[name].dtype == value.dtype and torch.equal(mine[name], value), name
        for _ in range(2):  # the second time DeepSpeed fetches ahead
            assert torch.equal(teacher(**packed()), whole(**packed()))
        with teacher.head_weight() as (head, _):
            assert torch.equal(head, expected["lm_head.weight"][:VOCABULARY])
        with teacher.embedding_weight() as embedding:
            assert torch.equal(embedding, expected["model.embed_tokens.weight"])


@pytest.mark.parametrize(("tied", "dtype", "files"), [(True, "float32", 1), (False, "bfloat16", 3)])
def test_a_block_has_the_weights_of_the_folder(tmp_path: Path, tied: bool, dtype: str, files: int) -> None:
    """Bit for bit, from one file or from several with an index, also cast to another type; and the logits of the world's shards."""
    model = random_model(seed=5, hidden=50, tied=tied, vocabulary=72)
    model.save_pretrained(tmp_path, max_shard_size="50GB" if files == 1 else "60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= files
    run_ranks(RANKS, weights_on_rank, tmp_path, dtype)


def held_while_resharding(path: Path) -> tuple[int, int]:
    """On a rank: the most elements of parameters that are whole at any time, looked at before every release, and what stays."""
    world = start_world()
    known: dict[int, torch.Tensor] = {}
    peak = 0
    release, made = partition_parameters.GatheredParameters.__exit__, partition_parameters.Init._zero_init_param

    def look(parameters: Iterable[torch.Tensor]) -> None:
        nonlocal peak
        known.update((id(p), p) for p in parameters)
        storages = {p.data.untyped_storage().data_ptr(): p.data.numel() for p in known.values()}
        peak = max(peak, sum(storages.values()))

    def released(self: Any, *error: Any) -> Any:
        look(getattr(self, "params", ()))
        return release(self, *error)

    def partitioned(self: Any, parameter: torch.Tensor) -> Any:
        look([parameter])
        return made(self, parameter)

    with (
        mock.patch.object(partition_parameters.GatheredParameters, "__exit__", released),
        mock.patch.object(partition_parameters.Init, "_zero_init_param", partitioned),
    ):
        teacher = load_frozen(path, config(), VOCABULARY, block=world.block(2).group)
    assert {id(p) for p in teacher.engine.module.parameters()} <= known.keys()
    return peak, sum(p.ds_tensor.numel() for p in known.values() if p.ds_tensor is not None)


def test_no_rank_holds_a_whole_model_while_it_moves_into_blocks(tmp_path: Path) -> None:
    random_model(seed=5, hidden=64, layers=12).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole, largest = model.num_parameters(), sum(p.numel() for p in model.model.layers[0].parameters())
    for peak, stays in run_ranks(RANKS, held_while_resharding, tmp_path):
        assert peak <= largest + 12 * 4 * 64, "more than a layer at a time"  # and placeholders
        assert stays < 0.51 * whole, "the world's shards are still there"


def sizes_on_rank(hosts: str) -> list[int | str]:
    """`hosts` has a letter per rank; its launcher takes every rank for the first of a node."""
    collective = start_world().collective
    os.environ |= {"NCCL_HOSTID": hosts[collective.rank], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    found: list[int | str] = []
    for shard in ("world", "node", 4, 2, 1, 3, 8):
        try:
            found.append(block_size(shard, collective, "teachers.math"))  # type: ignore[arg-type]
        except ConfigError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(
    ("hosts", "node"),
    [
        ("aaaa", 4),
        ("aabb", 2),
        ("abcd", 1),
        ("aaab", "a: 0-2; b: 3"),
        ("abba", "a: 0; b: 1-2; a: 3"),
        ("abab", "a: 0; b: 1; a: 2; b: 3"),
    ],
)
def test_the_ranks_of_a_block(hosts: str, node: int | str) -> None:
    """A node's are those of one host, whatever launchers have told them."""
    for world, found, *numbers, three, eight in run_ranks(RANKS, sizes_on_rank, hosts):
        assert (world, *numbers) == (4, 4, 2, 1)
        if isinstance(node, str):
            said = "teachers.math.shard is node, but hosts differ in their number of ranks, or their ranks are no neighbours"
            assert str(found).startswith(f"{said} ({node}); start as many on each")
        else:
            assert found == node
        assert three == "teachers.math.shard is 3, which does not divide the 4 ranks; set it to one of 1, 2, 4."
        assert str(eight).startswith("teachers.math.shard is 8, which does not divide the 4 ranks")


def node_on_rank(names: str) -> int | str:
    """With a host name of its own (in a namespace), but the kernel that all share."""
    collective = start_world().collective
    os.environ |= {"LOCAL_RANK": str(collective.rank % 2), "LOCAL_WORLD_SIZE": "2"}
    if names:
        assert ctypes.CDLL(None, use_errno=True).unshare(0x04000000) == 0, os.strerror(
            ctypes.get_errno()
        )  # CLONE_NEWUTS
        socket.sethostname(names[collective.rank])
    return block_size("node", collective, "teacher")


@pytest.mark.parametrize(("names", "node"), [("", 4), ("aabb", 2), ("abcd", 1)])
def test_a_node_is_a_host(names: str, node: int) -> None:
    """As two launchers on one host start ranks, and on two; and ranks in containers, which are no node together."""
    if names and os.geteuid() != 0:
        pytest.skip("names need root")
    assert run_ranks(RANKS, node_on_rank, names) == [node] * RANKS
