"""DeepSpeed ZeRO-3 engines: the student that learns, and the frozen teacher.

Weights are partitioned while they are read, so that loading never needs a whole model on one device, nor does learning for a model
beyond DeepSpeed's own limit (stage3_max_live_parameters); a rollout phase does, for the student's view (and for a teacher that is lent
whole). The only file that calls `deepspeed.initialize`.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import groups
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging as transformers_logging

from katds.models.attention import NAME as ATTENTION
from katds.models.causal import FlatCausalLM, HeadFunction
from katds.parallel.deepspeed_config import model_dtype, student_config, teacher_config, without_nvme
from katds.parallel.model_folder import gathered_state, save_config
from katds.parallel.offload import offload_device
from katds.parallel.shards import compared_within, reshard
from katds.parallel.view import StudentCopy, StudentView


class ZeroStudent:
    """The student under ZeRO-3: decode through `decoding`, learn through `forward`, `backward`, `step`.

    Args:
        keep: decode from a persistent copy of the weights, refreshed after updates, instead of gathering them for each phase.
        release: let go of each layer's weights between its forward and its backward.
    """

    def __init__(self, engine: Any, skeleton: FlatCausalLM, path: Path, keep: bool, release: bool) -> None:
        self.engine = engine
        self._path = path
        self._linear = zero3_linear_wrap if release else torch.nn.functional.linear
        self._changes = 0  # of the weights, through this object
        self._view = StudentView(engine.module, skeleton) if not keep else None
        self._copy = StudentCopy(engine.module, skeleton) if keep else None

    def decoding(self) -> AbstractContextManager[FlatCausalLM]:
        """Collective: the whole student, hook-free, for a rollout phase."""
        if self._copy is not None:
            return self._copy.open(self._changes)
        assert self._view is not None
        return self._view.open()

    def forward(self, **inputs: Any) -> Any:
        """Collective: `FlatCausalLM.forward` through the engine."""
        with _linear_as(self._linear):
            return self.engine(**inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Collective: adds the gradient of a loss that is already scaled; `last` marks the update's final micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Collective: one optimizer step with this learning rate; returns the global gradient norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        self._changes += 1
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def load_checkpoint(self, folder: str, **options: Any) -> Any:
        """Collective: the engine's `load_checkpoint`. Called on the engine itself, it would leave an old copy in use."""
        loaded = self.engine.load_checkpoint(folder, **options)
        self._changes += 1
        return loaded

    def export(self, folder: Path, tokenizer: Any, end_tokens: Sequence[str] = ()) -> None:
        """Collective: writes a Hugging Face folder from rank 0 in the model's dtype. `end_tokens`: rollout.end_tokens, which end its
        responses from now on."""
        with gathered_state(self.engine.module.model) as state:
            if state is not None:
                partial = folder.with_name(f"{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                self.engine.module.model.save_pretrained(partial, state_dict=state, safe_serialization=True)
                save_config(self._path, partial, tokenizer, end_tokens)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)


class ZeroFrozen:
    """A model under ZeRO-3 that only reads: the teacher, or a student to be evaluated. Calling it is a collective.

    Args:
        gather: what scoring reads: "layer" gathers each layer in every forward, "phase" all weights once per rollout phase,
            "once" all of them for good; see `teacher.gather` of the recipe.

    Attributes:
        ranks: how many neighbours, this one among them, share a set of shards. A collective, below, is one of theirs.
    """

    def __init__(self, engine: Any, vocabulary: int, gather: str) -> None:
        self.engine = engine
        group = next(engine.module.parameters()).ds_process_group
        self.ranks = group.size()
        self._block = group if self.ranks < dist.get_world_size() else None
        self._gather = gather
        skeleton = _skeleton(engine.module.model, vocabulary)
        self._copy = StudentCopy(engine.module, skeleton) if gather == "once" else None
        self._view = StudentView(engine.module, skeleton) if gather != "once" else None

    def decoding(self) -> AbstractContextManager[FlatCausalLM]:
        """Collective: the whole model, hook-free, for a rollout phase."""
        if self._copy is not None:
            return self._copy.open(version=0)
        assert self._view is not None
        return self._view.open()

    def reading(self) -> AbstractContextManager[Any]:
        """Collective: the forward that a rollout phase scores with."""
        return nullcontext(self) if self._gather == "layer" else self.decoding()

    @contextmanager
    def embedding_weight(self) -> Iterator[torch.Tensor]:
        """Collective unless it is kept whole: the weight [V, H] of the input embedding, gathered while the context is open."""
        if self._copy is not None:
            with self._copy.open(version=0) as model:
                yield model.model.get_input_embeddings().weight
            return
        weight = self.engine.module.model.get_input_embeddings().weight
        with deepspeed.zero.GatheredParameters([weight]):
            yield weight

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        plan: Any,
        head: HeadFunction | None,
        rows: torch.Tensor | None = None,
        cache: Any = None,
    ) -> Any:
        with torch.no_grad(), nullcontext() if self._block is None else compared_within(self._block):
            return self.engine(
                input_ids=input_ids, position_ids=position_ids, plan=plan, head=head, rows=rows, cache=cache
            )

    @contextmanager
    def head_weight(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Collective: the teacher's head (weight [V, H], bias), gathered while the context is open unless it is kept whole."""
        if self._copy is not None:
            with self._copy.open(version=0) as model:
                head = model.head_parameters()
            yield head  # outside: what follows is differentiated
            return
        with deepspeed.zero.GatheredParameters(list(self.engine.module.head.parameters())):
            yield self.engine.module.head_parameters()


def load_student(
    path: Path,
    user_config: dict[str, Any],
    vocabulary: int,
    optimizer: Any,
    checkpointing: bool,
    load_universal: bool = False,
    keep_copy: bool = False,
) -> ZeroStudent:
    """Collective: reads the folder at `path` under ZeRO-3 and wraps it with AdamW (`optimizer`: recipe section train.optimizer).

    With `keep_copy` it decodes from a copy of its own, `rollout.weights: copy`.
    """
    config = student_config(user_config, optimizer.gradient_clip)
    if load_universal:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    model = FlatCausalLM(_read(path, config), vocabulary)
    if checkpointing:
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    skeleton = _skeleton(model.model, vocabulary)
    engine, *_ = deepspeed.initialize(model=model, optimizer=_adamw(model, config, optimizer), config=config)
    engine.train()
    return ZeroStudent(engine, skeleton, path, keep_copy, not checkpointing and _released(engine))


def load_frozen(
    path: Path,
    user_config: dict[str, Any],
    vocabulary: int,
    gather: str = "layer",
    block: dist.ProcessGroup | None = None,
) -> ZeroFrozen:
    """Collective: reads the folder at `path` under ZeRO-3, without optimizer and gradients.

    With `block` each block of ranks has shards of the whole model; its collectives are then those of the block, but for this one.
    """
    config = teacher_config(user_config)
    if block is None or block.size() == dist.get_world_size():
        inner = _read(path, config)
    else:
        inner = _read(path, without_nvme(config))
        with _linear_as(torch.nn.functional.linear):
            reshard(inner, block, copy.deepcopy(config))
    model = FlatCausalLM(inner, vocabulary).requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return ZeroFrozen(engine, vocabulary, gather)


def _read(path: Path, config: dict[str, Any]) -> nn.Module:
    """from_pretrained under ZeRO-3: transformers partitions each weight as soon as it is read."""
    transformers_logging.disable_progress_bar()  # one bar per rank and model would bury the run's own lines
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = (
        None  # of hpZ: DeepSpeed makes one per process, and asserts that there is none yet
    )
    keep_alive = HfDeepSpeedConfig(copy.deepcopy(config))
    with _linear_as(torch.nn.functional.linear):  # zero.Init replaces it for the whole process and for good
        model = AutoModelForCausalLM.from_pretrained(
            path, config=_without_dropout(AutoConfig.from_pretrained(path)), dtype=model_dtype(config),
            attn_implementation=ATTENTION, use_safetensors=True,
        )  # fmt: skip
    del keep_alive
    return model


def _without_dropout(config: Any) -> Any:
    """The policy that learns is then the one that wrote the rollouts. An exported model keeps the rates of its folder."""
    for name, value in config.get_text_config().to_dict().items():
        if "drop" in name and isinstance(value, float):  # attention_dropout, attn_pdrop, layerdrop, drop_path_rate
            setattr(config.get_text_config(), name, 0.0)
    return config


@contextmanager
def _linear_as(linear: Any) -> Iterator[None]:
    """`torch.nn.functional.linear` for the length of the context.

    PyTorch's own keeps the weight for the backward, whole: a layer that ZeRO-3 lets go of after its forward stays in memory. DeepSpeed's
    does not, but costs more than a small layer itself. A checkpointed layer runs again and keeps nothing, with either.
    """
    before = torch.nn.functional.linear
    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = before


def _released(engine: Any) -> bool:
    """Whether ZeRO-3 lets go of weights between forward and backward at all: it keeps those that are used again within so many
    parameters, and the first layer is used again after all others, twice."""
    kept = min(engine.zero_max_live_parameters(), engine.zero_max_reuse_distance() / 2)
    return sum(p.ds_numel for p in engine.module.parameters()) > float(kept)


def _skeleton(model: nn.Module, vocabulary: int) -> FlatCausalLM:
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=model.dtype)
    return FlatCausalLM(twin, vocabulary)


def _adamw(model: nn.Module, config: dict[str, Any], settings: Any) -> torch.optim.Optimizer:
    arguments = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    if offload_device(config, "offload_optimizer") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(model.parameters(), **arguments)
    return torch.optim.AdamW(model.parameters(), fused=True, **arguments)
