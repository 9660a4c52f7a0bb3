"""What planning says of buffers, against buffers that katds and PyTorch really make."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_setup import engine, mixed_requests, models
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from katds.assemble import make_objective
from katds.cli import merge
from katds.config import Recipe
from katds.core.collective import Solo
from katds.core.objectives import OBJECTIVES
from katds.core.objectives.base import Progress
from katds.core.stop.simple import NeverRule
from katds.core.types import Need
from katds.models.attention import NAME
from katds.models.causal import FlatCausalLM
from katds.models.plans import PackedPlan
from katds.models.slot_cache import SlotCache
from katds.models.tiled_head import tiled_loss
from katds.plan import models as models_
from katds.plan import signal
from katds.plan.items import Memory
from katds.plan.job import Job
from katds.plan.lengths import Prompts, longest
from katds.plan.memory import memory
from katds.plan.models import ModelShape
from katds.plan.operators import Results
from katds.plan.recorded import prompts
from katds.plan.trace import LiveBytes, trace_forward, trace_score, trace_update
from katds.rollout.prefill import PREFILL_TOKENS

CPU = torch.device("cpu")


def job_of(recipe: Recipe, ranks: int = 2, device: str = "cpu") -> Job:
    return Job.of(recipe, ranks, device, prompts(recipe), longest(recipe), 4)


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(merge(recipe.model_dump(mode="json"), sections))


def item(found: Memory, name: str) -> int:
    (size,) = (i.bytes for i in found.items if name in i.name)
    return size


def test_caches_are_those_that_are_allocated(small: Recipe) -> None:
    job = job_of(small)
    found = memory(job)
    for role, shape in (("student", job.student), ("teacher", job.teachers[0].shape)):
        cache = SlotCache(small.rollout.slots, job.cache_length, CPU)
        cache.reserve(shape.layers, shape.kv_heads, shape.head_dim, torch.float32)
        allocated = sum(x.numel() * x.element_size() for i in range(shape.layers) for x in cache.buffers(i))
        assert item(found, f"{role}: key/value cache") == allocated
    longest_prompt = max(len(line.split()) for line in _texts(small)) + 2
    assert job.cache_length == longest_prompt + small.rollout.max_new_tokens + small.rollout.chunk_tokens


def _texts(recipe: Recipe) -> list[str]:
    """The prompts' words; the chat template puts one before and one behind."""
    return [json.loads(line)["prompt"] for line in recipe.data.train.read_text().splitlines()]


ON_TOKENS = [kind for kind in OBJECTIVES if kind != "cross_tokenizer"]


def test_a_row_of_text_has_two_likelihoods_a_count_and_what_was_written(small: Recipe) -> None:
    sections = {"objective": {"kind": "cross_tokenizer"}, "rollout": {"top_p": 1.0}}
    assert job_of(changed(small, stop={"kind": "never"}, **sections)).signal.bytes == 4 * 4


@pytest.mark.parametrize("kind", ON_TOKENS)
def test_a_row_of_the_signal_is_as_large_as_the_engine_makes_it(small: Recipe, kind: str) -> None:
    top_k = 6
    sections = {"objective": {"kind": kind}, "stop": {"kind": "never"}, "rollout": {"top_p": 1.0}}
    job = job_of(changed(small, teacher={"gather": "once"}, **sections))
    job = job.with_settings("rollout", divergence_top_k=top_k)
    pair = models(torch.float32)
    made = engine(pair, NeverRule(), job.objective.needs, top_k=top_k, teacher_top_k=job.objective.teacher_top_k)
    batch = made.generate(mixed_requests(), stream=1)
    rows = sum(rollout.kept for rollout in batch.rollouts)
    size = sum(values.numel() * values.element_size() for values in batch.signal.values())
    assert size == rows * replace(job.signal, hidden=pair.teacher.model.config.hidden_size).bytes


@pytest.mark.parametrize("kind", ON_TOKENS)
def test_what_an_objective_adds_to_a_row(small: Recipe, kind: str) -> None:
    """It travels with the rollouts, and lies at the learner: the guiding tokens of topd are more than all the rest."""
    sections = {"objective": {"kind": kind}, "stop": {"kind": "never"}, "rollout": {"top_p": 1.0}}
    job = job_of(changed(small, teacher={"gather": "once"}, **sections)).with_settings("rollout", divergence_top_k=6)
    pair, objective = models(torch.float32), job.objective
    made = engine(pair, NeverRule(), objective.needs, top_k=6, teacher_top_k=objective.teacher_top_k)
    batch = made.generate(mixed_requests(), stream=1)
    if kind == "topd":  # nothing is paid for, so that its teacher need not write
        objective = make_objective(changed(job.recipe, objective={"budget": 0.0001}))
    added = objective.prepare(batch, Progress(0, 1, 0, object()), Solo())  # type: ignore[arg-type]
    size = sum(values.numel() * values.element_size() for values in added.values())
    assert size == sum(rollout.kept for rollout in batch.rollouts) * job.signal.made_bytes
    assert (kind == "topd") == (job.signal.made_bytes > 100)


def test_a_reward_is_one_more_number_of_a_row(small: Recipe) -> None:
    whole = changed(small, rollout={"top_p": 1.0})
    plain, rewarded = (job_of(changed(whole, reward={"weight": weight})).signal for weight in (0.0, 0.5))
    assert rewarded.made_bytes == plain.made_bytes + 4 and rewarded.bytes == plain.bytes + 4  # with what was written


def tile(logprobs: torch.Tensor, at: slice, *others: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": (logprobs.exp() * logprobs).sum()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trace_is_that_of_a_real_update(small: Recipe, checkpointing: bool) -> None:
    """Real tensors, katds's own attention, autograd's own account of what it keeps."""
    shape, tokens = ModelShape.read(small.teacher.path, torch.float32, "teacher.path"), 400
    traced = trace_update(shape, tokens, checkpointing, tile, None, None)
    real = AutoModelForCausalLM.from_pretrained(small.teacher.path, attn_implementation=NAME, dtype=torch.float32)
    model = FlatCausalLM(real, shape.vocabulary).train()
    if checkpointing:
        real.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids, plan = torch.arange(tokens) % 60, PackedPlan.of([tokens], CPU)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda x: x):
        hidden = model.model.base_model(input_ids=ids[None], position_ids=ids[None], use_cache=False, plan=plan)
    if not checkpointing:  # what a checkpoint keeps, it keeps outside of autograd
        assert traced.kept == pytest.approx(sum(kept.values()), rel=0.1)
    del hidden
    with LiveBytes(*model.parameters(), *model.buffers(), ids) as mode:
        loss, _ = model(ids, ids, plan, lambda *given: tiled_loss(*given, 1.0, tile))
        assert max(mode.peak, 1) == pytest.approx(traced.loss, rel=0.1)
        mode.restart()
        loss.backward()
        assert mode.peak == pytest.approx(traced.backward, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_asking_an_operator_once_changes_no_number(
    small: Recipe, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Nor the order in which modules are entered; and most are not asked again."""
    shape, asked = ModelShape.read(small.student.path, torch.float32, "student.path"), Counter[str]()

    def found() -> tuple[Any, ...]:
        update = trace_update.__wrapped__(shape, 400, checkpointing, tile, 5000, 24)
        score = trace_score.__wrapped__(shape, 400, frozenset({Need.SAMPLED, Need.TEACHER_TOP_K}), 3, 5, 5000)
        return update, score, trace_forward.__wrapped__(shape, 400), shape._order(True, checkpointing)

    once = found()
    known = Results.of

    def counted(results: Results, function: Any, args: Any, kwargs: Any) -> Any:
        before = len(results._known)
        result = known(results, function, args, kwargs)
        asked["hits" if len(results._known) == before and results._pure[function] else "others"] += 1
        return result

    monkeypatch.setattr(Results, "of", counted)
    assert found() == once
    monkeypatch.setattr(Results, "of", lambda results, function, args, kwargs: function(*args, **kwargs))
    assert found() == once
    assert asked["hits"] > 0.3 * asked.total()


def test_results_that_are_not_made_anew() -> None:
    """A view, what is written to, and what only seems to be new belong to what there was before."""
    x = torch.empty(4, 6, device="meta")
    with LiveBytes(x) as mode:
        for _ in range(2):
            views = [x.t(), x[1:], torch.ops.aten._unsafe_view(x, [24]), x.add_(1), *x.split(2)]
            assert mode.live == 0 and {each.untyped_storage()._cdata for each in views} == {x.untyped_storage()._cdata}
        for _ in range(2):
            whole = (x + 1, x + 1.0, x.to(torch.int64) + 1, x.to(torch.int64) + 1.0, x.t().contiguous(), x.topk(2))
            kinds = [each.dtype for each in whole[:4]]
            assert kinds == [torch.float32, torch.float32, torch.int64, torch.float32] and whole[4].stride() == (4, 1)
            assert type(whole[5]).__name__ == "topk" and whole[5].indices.dtype == torch.int64
            assert mode.live == 4 * 24 * 4 + 24 * 8 + 4 * 2 * (4 + 8)  # of float32, int64, and topk's two
            del whole


def test_what_was_found_before_changes_no_number(small: Recipe) -> None:
    """Plans of recipes that differ in what a trace depends on, one after the other and each by itself."""
    whole: dict[str, Any] = {"teacher": {"gather": "phase"}, "rollout": {"top_p": 1.0}}
    ways: list[dict[str, Any]] = [
        *({"objective": {"kind": kind}} for kind in ("reverse_kl", "tropd")),
        {"objective": {"kind": "reverse_kl", "support": "full"}},
        {"rollout": {"top_p": 1.0, "divergence_top_k": 5}},
        {"train": {"activation_checkpointing": True}},
        {"train": {"micro_batch_tokens": 200}},
        {"student": {"path": str(small.teacher.path)}},
    ]
    jobs = [lambda way=way: job_of(changed(small, **merge(whole, way))) for way in ways]
    warm = [memory(job()).items for job in jobs]
    assert len({str(items) for items in warm}) == len(ways)
    for job, items in zip(jobs, warm, strict=True):
        forget()
        assert memory(job()).items == items


def forget() -> None:
    for found in (trace_update, trace_forward, trace_score):
        found.cache_clear()
    models_._SHAPES.clear()
    signal._TILES.clear()


@pytest.mark.parametrize("kind", [*OBJECTIVES, "guided"])
def test_every_objective_has_its_loss(small: Recipe, kind: str) -> None:
    """Its tile runs without numbers, also on rows that the teacher wrote."""
    sections: dict[str, Any] = {"teacher": {"gather": "phase"}, "rollout": {"top_p": 1.0}, "objective": {"kind": kind}}
    if kind == "guided":
        sections |= {"objective": {"kind": "tropd"}, "behaviour": {"kind": "teacher_prefix"}}
    found = memory(job_of(changed(small, **sections)), ("learn",))
    assert item(found, "signal of the kept tokens") > 0 and any(i.name == "loss" for i in found.items)


def test_of_several_experts_a_token_is_multiplied_with_some(tmp_path: Path) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}
    config = Qwen3MoeConfig(
        **sizes, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32
    )
    config.save_pretrained(tmp_path)
    shape = ModelShape.read(tmp_path, torch.float32, "student.path")
    expert, attention = 3 * 64 * 32, 2 * (4 + 2) * 16 * 64
    assert shape.experts == 3 * 8 * expert and shape.multiplied == 3 * (8 * expert + attention) + 100 * 64
    assert shape.token_flops == 2 * (3 * (2 * expert + attention) + 100 * 64)


def test_live_bytes_follow_what_lives() -> None:
    old = torch.zeros(1000)
    with LiveBytes(old) as mode:
        a = torch.zeros(256)
        view = a[:8]
        assert (mode.live, mode.peak) == (1024, 1024)
        del a
        assert mode.live == 1024  # the view holds it
        del view
        assert mode.live == 0
        (old[:4] + 1).sum()
        assert mode.live == 0 and mode.peak == 1024


def test_every_way_to_hold_models_has_its_items(small: Recipe) -> None:
    plain, job = memory(job_of(small)), job_of(small)
    once = memory(job_of(changed(small, teacher={"gather": "once"})))
    assert once.at("optimizer") - plain.at("optimizer") == item(once, "teacher: whole") == job.teachers[0].shape.bytes
    copy = memory(job_of(changed(small, rollout={"weights": "copy"})))
    kept = item(copy, "inference copy") + item(copy, "student: key/value cache")
    assert copy.at("optimizer") - plain.at("optimizer") == kept > job.student.bytes
    assert not any("view" in i.name for i in copy.items)
    blended = memory(job_of(changed(small, teacher={"gather": "phase"}, behaviour={"kind": "trb"})))
    assert item(blended, "logits and sampling") > item(plain, "logits and sampling")
    full = memory(job_of(changed(small, objective={"kind": "reverse_kl", "support": "full"})))
    shape = job_of(small).teachers[0].shape
    assert item(full, "teacher: head") == shape.vocabulary * shape.hidden * 4


@pytest.mark.parametrize(("gather", "teacher_reads"), [("once", PREFILL_TOKENS + 9 * 2), ("layer", 5 * 4096 + 9 * 2)])
def test_prompts_are_read_in_forwards_of_the_engine_s_size(small: Recipe, gather: str, teacher_reads: int) -> None:
    recipe = changed(small, teacher={"gather": gather}, rollout={"slots": 9, "chunk_tokens": 2, "fast_decode": False})
    found = memory(replace(job_of(recipe), prompts=Prompts(4096, 4096, "a test")), ("rollout",))  # two rollouts each
    (student, teacher) = (i for i in found.items if "reading" in i.name)
    assert (
        f"a forward of {PREFILL_TOKENS} tokens" in student.how and f"a forward of {teacher_reads} tokens" in teacher.how
    )
    assert student.bytes == trace_forward(job_of(recipe).student, PREFILL_TOKENS)


def test_several_teachers_add_up(small: Recipe) -> None:
    other = small.teacher.model_dump(mode="json")
    recipe = changed(small, teachers={"other": other}, data={"teacher_column": "prompt"})
    one = memory(job_of(small))
    with_two = Job.of(recipe, 2, "cpu", prompts(small), longest(small), 4)
    two = memory(with_two)
    for name in ("shard", "key/value cache", "gathered layers"):
        first, both = (
            sum(i.bytes for i in m.items if i.name.startswith("teacher") and name in i.name) for m in (one, two)
        )
        assert both == 2 * first > 0
