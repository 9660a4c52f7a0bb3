"""A model's folder, as far as it is read before any weight: config.json, tokenizer, generation_config.json and the names of its files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from katds.errors import ConfigError, first_sentence

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Computations on logits after the linear head, and the value that means none. The tiled head applies the head only.
LOGIT_POSTPROCESSING: dict[str, tuple[object, ...]] = {
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "lm_head_multiplier": (None, 1),
}
# A checkpoint with another head (reward model, embedding) would get a random vocabulary head.
LANGUAGE_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    field: str
    path: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]


def inspect_folder(field: str, path: Path) -> ModelFolder:
    _check_folder(field, path)
    raw = _read_json(field, path / "config.json")
    _check_config(field, path, raw)
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise ConfigError(
            f"{field} is {path}, whose configuration or tokenizer cannot be read ({first_sentence(error)}). "
            "Download the folder again."
        ) from None
    _check_head(field, path, config)
    return ModelFolder(field, path, config, tokenizer, _eos_ids(field, path, config, tokenizer))


def steady_tokens(config: Any) -> int | None:
    """How long texts may be before the rotary angles of a forward change for all of them with the longest (rope_type dynamic and longrope);
    None where they never do. Beyond it a rollout would depend on those beside it, and a cache mix both kinds of keys."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for each in (
        rope,
        *(kind for kind in rope.values() if isinstance(kind, dict)),
    ):  # some models have one per kind of layer
        if "dynamic" in str(each.get("rope_type")):
            limits.append(int(config.max_position_embeddings))
        elif each.get("rope_type") == "longrope":
            limits.append(int(each["original_max_position_embeddings"]))
    return min(limits, default=None)


def _check_folder(field: str, path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(
            f"{field} is {path}, which is no folder (seen from {Path.cwd()}). "
            "Give a downloaded checkpoint's folder; names on the Hugging Face hub are not resolved."
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"{field} is {path}, which has no config.json. Give the folder of a Hugging Face checkpoint.")
    if not any((*path.glob("tokenizer*"), *path.glob("vocab*"))):
        # transformers would make an empty tokenizer of the model's type.
        raise ConfigError(
            f"{field} is {path}, which has no tokenizer. Copy tokenizer.json and tokenizer_config.json there."
        )
    if not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"{field} is {path}, which has no *.safetensors; pickled weights are not read (safetensors only). "
            "Convert it with save_pretrained."
        )
    index = path / "model.safetensors.index.json"
    shards = set(_read_json(field, index).get("weight_map", {}).values()) if index.is_file() else set()
    if missing := sorted(shard for shard in shards if not (path / shard).is_file()):
        raise ConfigError(
            f"{field} is {path}, which lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}. "
            "Finish the download."
        )


def _read_json(field: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field}: {path} cannot be read ({first_sentence(error)}). Download the folder again."
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{field}: {path} holds no JSON object. Download the folder again.")
    return content


def _check_config(field: str, path: Path, raw: dict[str, Any]) -> None:
    tokenizer = path / "tokenizer_config.json"
    if "auto_map" in raw or (tokenizer.is_file() and "auto_map" in _read_json(field, tokenizer)):
        raise ConfigError(
            f"{field} is {path}, which runs its own Python code (auto_map). "
            "Use a model that transformers implements; remote code is never trusted."
        )
    heads = raw.get("architectures") or []
    if heads and not any(head.endswith(LANGUAGE_HEADS) for head in heads):
        raise ConfigError(f"{field} is {path}, a {heads[0]}. Use a checkpoint with a language model head, ForCausalLM.")
    if "quantization_config" in raw:
        raise ConfigError(
            f"{field} is {path}, whose weights are quantised (quantization_config). Use the bf16 checkpoint."
        )


def _check_head(field: str, path: Path, config: PretrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{field} is {path}, a {config.model_type!r} model. "
            "Use a decoder-only language model that transformers implements."
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConfigError(
            f"{field} is {path}, which has {sorted(kinds)[0]} layers. Use a model with attention layers only."
        )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ConfigError(
            f"{field} is {path}, which caps attention scores (attn_logit_softcapping). Use another model."
        )
    for name, neutral in LOGIT_POSTPROCESSING.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise ConfigError(
                f"{field} is {path}, which transforms its logits after the head ({name} = {value}). "
                "The vocabulary-tiled loss applies the linear head only. Use a model without it."
            )


def _eos_ids(field: str, path: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Union of what generation_config.json, config.json and the tokenizer call an end token; each may lack one."""
    generation = path / "generation_config.json"
    declared = _read_json(field, generation).get("eos_token_id") if generation.is_file() else None
    ids: set[int] = set()
    for value in (declared, config.eos_token_id, tokenizer.eos_token_id):
        ids |= set(value) if isinstance(value, list) else {value} if value is not None else set()
    return tuple(sorted(ids))
