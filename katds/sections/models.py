"""Which models, and which prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from katds.settings import Positive, Section


class ModelConfig(Section):
    """A model, and how DeepSpeed holds it."""

    path: Path = Field(description="Hugging Face folder (config.json, *.safetensors, tokenizer)")
    deepspeed: Path = Field(
        Path("ds_configs/zero3_bf16.json"), description="DeepSpeed JSON: ZeRO, precision and offload only"
    )


class TeacherConfig(ModelConfig):
    """The model that is distilled."""

    gather: Literal["layer", "phase", "once"] = Field(
        "layer",
        description="gather each layer in every forward; or all weights once per rollout phase: a teacher that fits on "
        "one device then costs no communication while it scores; or once and for all: the memory is never given back",
    )
    shard: Literal["world", "node"] | Annotated[int, Field(ge=1, strict=True)] = Field(
        "world",
        description="the ranks that share one set of its shards: all; those of each node (host), which then gathers it over its own "
        "links and writes at its own pace; or so many neighbours. Fewer ranks hold larger shards",
    )


class DataConfig(Section):
    """Training prompts."""

    train: Path = Field(description="file or folder: .jsonl, .json, .csv, .parquet or a saved Hugging Face dataset")
    prompt_column: str = Field(
        "prompt",
        description="column with the prompt: text, or a list of {role, content}; a.b is field b of what is in column a",
    )
    prompt_suffix: str = Field("", description="text put after every prompt, e.g. in which form to give the answer")
    answer_column: str | None = Field(
        "answer", description="column with the reference answer, or a.b as above; null if there is none"
    )
    teacher_column: str | None = Field(
        None, description="column that names a prompt's teacher in `teachers`; a prompt without a name has `teacher`"
    )
    chat_template: bool | Literal["teacher"] = Field(
        True,
        description="render prompts through the tokenizer's chat template; teacher: for a teacher with another tokenizer only, the "
        "student reads them as they are",
    )
    template_options: dict[str, bool | int | str] = Field(
        default_factory=dict, description="extra arguments of the chat template, e.g. enable_thinking: false"
    )
    max_prompt_tokens: Positive = Field(1024, description="a longer prompt is an error")
    shuffle: bool = Field(True, description="a new order each epoch, from run.seed")
