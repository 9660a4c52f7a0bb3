"""Pairs of random models whose rollouts have known lengths, and prompts for them, as folders that any trainer reads.

Lengths are built into the weights. Channel 0 of the residual stream holds a sign that no layer writes to, and that outweighs all
they write elsewhere; the (tied) head reads it. Words of the first half of the vocabulary carry +, those of the second half -,
so a text stays in the half that its prompt is in. The end token's row decides how often a text of the first half ends: never, or with
a probability per token that is set by measuring the finished model. A text of the second half never ends.

Invariants: while the weights are those that `build` wrote, a token that should not come (another half's, padding, an end where
none is due) has a probability below 1e-9.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIALS = ("<pad>", "<eos>")
# Logit of a word of the text's own half; the other half has the negative. Far enough for never, and not so far that probabilities
# become denormal numbers, which a CPU computes slowly.
LOGIT = 20.0
QUIET = 0.01  # scale of what the layers write
# A random row of the embedding is at most this part of `LOGIT` as long as channel 0 is high, however wide the model: standard
# deviation x root of the width <= 0.64 x LOGIT / root of the width.
NOISE = 0.64 * LOGIT


@dataclass(frozen=True)
class Size:
    """A Qwen3 model.

    Args:
        heads: of the queries, of the keys, and the width of one; by default those of about 12 hidden^2 parameters a layer.
        tied: the head is the embedding.
    """

    hidden: int
    layers: int
    heads: tuple[int, int, int] | None = None
    tied: bool = True

    def config(self, vocabulary: int) -> dict[str, Any]:
        count = max(4, self.hidden // 64)
        heads, kv_heads, width = self.heads or (count, count // 2, self.hidden // count)
        return {
            "vocab_size": vocabulary, "hidden_size": self.hidden, "intermediate_size": 3 * self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": width, "max_position_embeddings": 8192, "tie_word_embeddings": self.tied,
            "initializer_range": min(0.02, NOISE / self.hidden),
            "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
        }  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """One shape of an on-policy distillation step.

    Args:
        rollouts: per rank and step.
        new_tokens: longest response.
        long_every, mean_short: of `long_every` successive prompts one, at a random place, leads to `new_tokens` tokens; the responses
            to the others are geometrically distributed with mean `mean_short`, the end token included. 0: every response has
            `new_tokens` tokens.
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


@dataclass(frozen=True)
class Task:
    """One step's work on given models: what katds and a peer do alike.

    Args:
        prompts: JSON lines, read in this order.
        rollouts: per rank and step.
        at_once: of these, how many a peer puts into one forward.
        lr: learning rate.
        precision: "fp32", or "bf16" with an optimizer in fp32.
    """

    student: Path
    teacher: Path
    prompts: Path
    rollouts: int
    at_once: int
    new_tokens: int
    steps: int
    lr: float
    precision: str = "fp32"


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

# Of Qwen3 0.6B, 1.7B and 8B.
QWEN_8B = Size(4096, 36, (32, 8, 128), tied=False)
QWEN = {
    w.name: w
    for w in (
        Workload("qwen-0.6b", Size(1024, 28, (16, 8, 128)), QWEN_8B, 151936, rollouts=16, new_tokens=512),
        Workload("qwen-1.7b", Size(2048, 28, (16, 8, 128)), QWEN_8B, 151936, rollouts=16, new_tokens=512),
    )
}


def build(workload: Workload, root: Path, prompts: int, seed: int = 0, precision: str = "fp32") -> Path:
    """Writes student/, teacher/ and prompts.jsonl below `root`."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    for role, size in (("student", workload.student), ("teacher", workload.teacher)):
        torch.manual_seed(2 * seed + (role == "teacher"))
        folder = root / role
        with torch.device(fastest):
            model = _model(size, workload)
        (model.bfloat16() if precision == "bf16" else model).save_pretrained(folder)
        del model
        _tokenizer(workload.vocabulary).save_pretrained(folder)
    rows = ({"prompt": text} for text in _prompts(workload, prompts, random.Random(seed)))
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _prompts(workload: Workload, count: int, draw: random.Random) -> Iterator[str]:
    half = (workload.vocabulary - len(SPECIALS)) // 2
    every = workload.long_every
    for index in range(count):
        if every and index % every == 0:
            long = index + draw.randrange(every)
        first = half if every and index == long else 0
        yield " ".join(f"w{first + draw.randrange(half)}" for _ in range(workload.prompt_tokens))


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIALS, *(f"w{i}" for i in range(vocabulary - len(SPECIALS)))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def _model(size: Size, workload: Workload) -> Any:
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**size.config(workload.vocabulary))).eval()
    sign = LOGIT / math.sqrt(size.hidden)  # the last norm brings channel 0 to the root of the width
    half = (workload.vocabulary - len(SPECIALS)) // 2
    with torch.no_grad():
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight *= QUIET
                writer.weight[0] = 0.0
        tables = (model.model.embed_tokens.weight, model.lm_head.weight)  # one and the same if tied
        for table in tables:
            table[:, 0] = sign
            table[len(SPECIALS) + half :, 0] = -sign
            table[0, 0] = 0.0
            table[1] = 0.0
        end = _end_sign(model, half, workload.mean_short) if workload.mean_short else 0.0
        for table in tables:
            table[1, 0] = end
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, do_sample=True)
    return model


def _end_sign(model: Any, half: int, mean: int, texts: int = 16, words: int = 64) -> float:
    """Channel 0 of the end token's row with which a text of the first half ends after `mean` tokens on average."""
    import torch

    text = torch.randint(len(SPECIALS), len(SPECIALS) + half, (texts, words))
    hidden = model.model(text).last_hidden_state
    logits = model.lm_head(hidden)
    logits[..., 1] = -torch.inf
    others, read = logits.logsumexp(-1).double(), hidden[..., 0].double()
    low, high = 0.0, 2.0 * float(model.model.embed_tokens.weight[:, 0].max())
    for _ in range(60):
        middle = (low + high) / 2
        if torch.sigmoid(middle * read - others).mean() * mean < 1:
            low = middle
        else:
            high = middle
    return low
