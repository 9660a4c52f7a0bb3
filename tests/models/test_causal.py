"""What a wrapped model says of itself."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from katds.core.packing import attention_weight
from katds.models.causal import FlatCausalLM


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
