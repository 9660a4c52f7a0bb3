"""Pairs of random models whose rollouts have known lengths, and prompts for them, as folders that any trainer reads.

Lengths are built into the weights. Channel 0 of the residual stream holds a constant sign that no layer writes to; the
(tied) head reads it. Words of the first half of the vocabulary carry +, those of the second half -, so a text stays in the half that
its prompt is in, and the end token's row decides how often a text of the first half ends: never, or every so many words.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIALS = ("<pad>", "<eos>")


@dataclass(frozen=True)
class Size:
    """A Qwen3 model; about 12 hidden^2 x layers + vocabulary x hidden parameters."""

    hidden: int
    layers: int

    def config(self, vocabulary: int) -> dict[str, Any]:
        heads = max(4, self.hidden // 64)
        return {
            "vocab_size": vocabulary, "hidden_size": self.hidden, "intermediate_size": 3 * self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
            "head_dim": self.hidden // heads, "max_position_embeddings": 8192, "tie_word_embeddings": True,
            "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
        }  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """One shape of an on-policy distillation step.

    Args:
        rollouts: per rank and step.
        new_tokens: longest response.
        long_every, mean_short: all but every `long_every`-th prompt lead to short responses of about `mean_short`
            words (geometrically distributed); 0: every response has `new_tokens`.
    """

    name: str
    student: Size
    teacher: Size
    vocabulary: int
    rollouts: int
    new_tokens: int
    prompt_tokens: int = 16
    long_every: int = 0
    mean_short: int = 0


TINY = (Size(128, 4), Size(256, 6), 2048)  # 1.05 M and 5.2 M parameters
SMALL = (Size(384, 8), Size(640, 10), 16384)  # 20 M and 60 M
WORKLOADS = {
    w.name: w
    for w in (
        Workload("tiny", *TINY, rollouts=16, new_tokens=128),
        Workload("small", *SMALL, rollouts=16, new_tokens=128),
        Workload("long", *TINY, rollouts=16, new_tokens=512),
        Workload("skewed", *TINY, rollouts=64, new_tokens=512, long_every=32, mean_short=32),
        Workload("smoke", Size(32, 1), Size(32, 1), 128, rollouts=4, new_tokens=16),
    )
}


def build(workload: Workload, root: Path, prompts: int, seed: int = 0) -> Path:
    """Writes student/, teacher/ and prompts.jsonl below `root`."""
    import torch

    for role, size in (("student", workload.student), ("teacher", workload.teacher)):
        torch.manual_seed(2 * seed + (role == "teacher"))
        folder = root / role
        _model(size, workload).save_pretrained(folder)
        _tokenizer(workload.vocabulary).save_pretrained(folder)
    draw = random.Random(seed)
    rows = [json.dumps({"prompt": _prompt(workload, i, draw)}) + "\n" for i in range(prompts)]
    (root / "prompts.jsonl").write_text("".join(rows))
    return root


def _prompt(workload: Workload, index: int, draw: random.Random) -> str:
    half = (workload.vocabulary - len(SPECIALS)) // 2
    first = half if workload.long_every and index % workload.long_every == 0 else 0
    return " ".join(f"w{first + draw.randrange(half)}" for _ in range(workload.prompt_tokens))


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIALS, *(f"w{i}" for i in range(vocabulary - len(SPECIALS)))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def _model(size: Size, workload: Workload) -> Any:
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**size.config(workload.vocabulary)))
    half = (workload.vocabulary - len(SPECIALS)) // 2
    reach = math.sqrt(size.hidden)  # of channel 0 after the last norm, where it is nearly all there is
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        table = model.model.embed_tokens.weight
        table[:, 0] = 1.0
        table[len(SPECIALS) + half :, 0] = -1.0
        table[1] = 0.0
        # Against `half` words of weight e^reach each.
        table[1, 0] = 1.0 + math.log(half / workload.mean_short) / reach if workload.mean_short else -2.0
        table[0] = 0.0
        table[0, 0] = -2.0 if not workload.long_every else 0.0
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=True)
    return model
