"""What a wrapped model says of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from katds.core.packing import attention_weight
from katds.models.causal import FlatCausalLM, linear
from katds.models.slot_cache import SlotCache, ragged_plan


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_attention_weight_counts_every_matrix(family: str) -> None:
    """GPT-2's are no nn.Linear."""
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(
        family, **shape, **({} if family == "gpt2" else {"head_dim": 8, "intermediate_size": 64})
    )
    model = AutoModelForCausalLM.from_config(config)
    tables = {"model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight"}
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name not in tables)
    assert FlatCausalLM(model, 50).attention_weight() == attention_weight(3, 32, matrices)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0},
    ],
)
@torch.no_grad()
def test_a_slot_past_its_end_leaves_the_angles_of_the_others(rope: dict[str, Any]) -> None:
    """It decodes to the end of its chunk, where a model whose angles change with the longest text would change those of all."""
    torch.manual_seed(0)
    rope |= {"rope_theta": 100.0, "original_max_position_embeddings": 16}
    config = AutoConfig.for_model(
        "llama", vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, rope_parameters=rope,
    )  # fmt: skip
    model = FlatCausalLM(AutoModelForCausalLM.from_config(config, attn_implementation="katds").eval(), 50)
    seen = []
    for other in (15, 20):  # tokens of the second slot; 16 are the model's
        cache, ids = SlotCache(2, 32, torch.device("cpu")), (torch.arange(8 + other) * 7) % 50
        plan, positions = ragged_plan(cache, 0, [0, 0], [8, other], 0)
        seen.append(model(ids, positions, plan, linear, cache=cache)[:8])
    torch.testing.assert_close(*seen, rtol=0, atol=1e-6)
