"""Tiny models in Hugging Face folders, for tests."""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

WORDS = 61
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Whitespace-separated words w0 .. w60 and four specials."""
    specials = ["<pad>", "<eos>", "<user>", "<assistant>"]
    vocabulary = {word: i for i, word in enumerate(specials + [f"w{i}" for i in range(WORDS)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=specials[2:],
        chat_template=TEMPLATE,
    )


def random_model(
    seed: int,
    hidden: int = 32,
    layers: int = 2,
    tied: bool = False,
    vocabulary: int | None = None,
    sharpness: float = 12.0,
    head_dim: int = 8,
    **extra: object,
) -> Qwen3ForCausalLM:
    """A random model whose next-token distribution is far from uniform, so that wrong logits show."""
    torch.manual_seed(seed)
    tok = tokenizer()
    config = Qwen3Config(
        vocab_size=vocabulary or len(tok), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=512,
        tie_word_embeddings=tied, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, bos_token_id=None,
        **extra,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    model.generation_config = GenerationConfig(eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    return model


def build_model(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Saves a `random_model` and the tokenizer."""
    random_model(seed, **options).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def build_pair(root: Path) -> Path:
    build_model(root / "student", seed=1, tied=True)
    build_model(root / "teacher", seed=2, hidden=48)
    return root


def deepspeed_json() -> dict[str, Any]:
    """ZeRO-3 in fp32 that really gathers: DeepSpeed would otherwise keep parameters as small as these on every rank."""
    return {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False}}


def optimizer(**changes: Any) -> SimpleNamespace:
    """What katds reads of the recipe's section train.optimizer."""
    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "gradient_clip": 1.0}
    return SimpleNamespace(**defaults | changes)


def build_recipe(root: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """A small run with KAT as a recipe's mapping; makes its models, data and DeepSpeed JSON below `root` where they are missing.

    `changes` are laid on the sections of the same name. Its threshold is warm after one step, so that KAT cuts.
    """
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "teacher").exists():
        build_pair(root)
    for file, rows in (("train", 40), ("eval", 5)):
        draw = random.Random(file)
        prompts = [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(1, 9))) for _ in range(rows)]
        lines = [json.dumps({"prompt": prompt, "answer": str(draw.randrange(2))}) for prompt in prompts]
        (root / f"{file}.jsonl").write_text("".join(line + "\n" for line in lines))
    (root / "zero3.json").write_text(json.dumps(deepspeed_json()))
    recipe = {
        "run": {"name": name, "folder": str(root / "runs"), "seed": 3},
        "student": {"path": str(root / "student"), "deepspeed": str(root / "zero3.json")},
        "teacher": {"path": str(root / "teacher"), "deepspeed": str(root / "zero3.json")},
        "data": {"train": str(root / "train.jsonl"), "max_prompt_tokens": 32},
        "rollout": {
            "prompts_per_step": 6, "samples_per_prompt": 2, "max_new_tokens": 24, "slots": 4, "chunk_tokens": 5,
            "audit_fraction": 0.25, "divergence_top_k": 16, "temperature": 1.5,
        },
        "stop": {
            "kind": "kat", "window": 4, "stride": 1, "persistence": 2, "min_kept": 3,
            "threshold": {"eta": 0.3, "capacity": 32, "min_entries": 4, "min_steps": 1, "source": "completed"},
        },
        # A small eps would turn rounding errors of tiny gradients into whole updates.
        "train": {"steps": 4, "micro_batch_tokens": 80, "optimizer": {"lr": 1e-3, "eps": 1e-4, "warmup_fraction": 0.5}},
        "evaluation": {
            "data": str(root / "eval.jsonl"), "samples": 2, "every": 2, "max_new_tokens": 8, "temperature": 3.0,
            "grader": {"kind": "match", "pattern": r"w\d*([01])"},
        },
        "checkpoint": {"every": 2},
    }  # fmt: skip
    return {section: values | changes.get(section, {}) for section, values in recipe.items()} | {
        section: values for section, values in changes.items() if section not in recipe
    }


def once(base: Path, name: str, build: Callable[[], object]) -> Any:
    """build(), or what it gave in another test process of this session; JSON-compatible. `base` is shared by the processes."""
    file = base / f"{name}.json"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.write_text(json.dumps(build()))
    return json.loads(file.read_text())


def shared_folder(factory: Any) -> Path:
    """One folder for all test processes of this session (pytest-xdist gives each a subfolder of it)."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder
