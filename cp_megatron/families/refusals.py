"""Errors for folders that no family reads, and what runs such models instead."""

from __future__ import annotations

import re
from typing import Any

from cp_megatron.errors import ConfigError
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_ADAPTER = 'attn_implementation="cp_megatron" in transformers'
_EXPERTS = re.compile(r"(moe_)?(num|n)(_local|_routed)?_experts")
_CAUSAL = """
    AXK1 Afmoe Apertus Apertus1p5Text Arcee AriaText BailingHybrid Bamba Beam BioGpt BitNet
    CodeGen Cohere Cohere2 Cohere2Moe CohereCompass Cwm Dbrx DeepseekV2 DeepseekV3 DiffLlama
    Dory Dots1 Electra Emu3 Ernie Ernie4_5 Ernie4_5_Moe Exaone4 ExaoneMoe FalconH1 FlexOlmo
    Flint Fuyu GPTBigCode GPTJ GPTNeoX Gemma Gemma2 Gemma3 Gemma3n Gemma4 Gemma4Unified Glm Glm4
    Glm4Moe Glm4MoeLite GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeSWA
    GraniteMoeShared GraniteSWA HYV3 Helium HrmText HunYuanDenseV1 HunYuanMoEV1 HyperCLOVAX
    Jais2 JetMoe KimiLinear Kolibri1 Laguna LaraMini Lfm2 Lfm2Moe Lfm3 Llama LongcatFlash Mamba2
    Mellum MiMoV2Flash MiniCPM3 MiniMaxM2 MiniMaxM3VL Ministral Ministral3 Mistral Mixtral
    Mllama ModernBertDecoder Moshi NanoChat Nemotron NemotronH OPT Olmo Olmo2 Olmo3 OlmoHybrid
    Olmoe Persimmon Phi Phi3 Phi4Multimodal Phimoe Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next
    Qwen3_5 Qwen3_5Moe RoCBert SeedOss SmolLM3 SolarOpen StableLm Starcoder2 VaultGemma Whisper
    Youtu Zamba2
"""
_OTHERS = """
    BertGenerationDecoder BertLMHeadModel CTRLLMHeadModel GPT2LMHeadModel
    Gemma3ForConditionalGeneration Gemma4ForConditionalGeneration
    GotOcr2ForConditionalGeneration MossTranscribeDiarizeForConditionalGeneration
"""
ADAPTER_SERVES = frozenset((*(f"{name}ForCausalLM" for name in _CAUSAL.split()), *_OTHERS.split()))
"""Architectures for which the adapter computes on two ranks what transformers computes on one, as
benchmarks/families.py has measured with transformers 5.24."""


def alternative_of(family: Family) -> str:
    """Names what trains a model that its family refuses; empty if nothing does."""
    served = ADAPTER_SERVES.intersection((family.architecture, *family.classes))
    return _ADAPTER if served else ""


def experts_key(entries: dict[str, Any]) -> str | None:
    """Returns the key that says that a model is a mixture of several experts; None if none does."""
    for key, value in entries.items():
        if _EXPERTS.fullmatch(key) and type(value) is int and value > 1:
            return key
    return None


def unknown_architecture(fields: JsonFields, key: str, name: str, known: str) -> ConfigError:
    """Makes the error for an architecture, named under ``key``, that no family has.

    It says whether the model is a mixture of experts and whether the adapter serves it.
    """
    parts = (fields.value, *(x for x in fields.value.values() if isinstance(x, dict)))
    why = [
        f"it is a mixture of {entries[experts]} experts"
        for entries in parts
        if (experts := experts_key(entries))
    ][:1]
    if isinstance(fields.value.get("text_config"), dict):
        why.append("it reads more than text; a folder of its language model alone may be supported")
    wanted = f"{name}forcausallm" if key == "model_type" else name
    plain = {architecture.lower() for architecture in ADAPTER_SERVES}
    serves = wanted.replace("_", "").lower() in plain
    why.append(f"{_ADAPTER} {'computes' if serves else 'is not known to compute'} it")
    return fields.unsupported(key, known, "; ".join(why))
