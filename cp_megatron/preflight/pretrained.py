"""What a run that starts from a Hugging Face folder must satisfy; no torch."""

from __future__ import annotations

from cp_megatron.checkpoint.hf_files import FLAG, read_hf_weights
from cp_megatron.config import Config, ModelConfig
from cp_megatron.config.fields import settings
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.families.llama import has_tokenizer, read_hf_config

# What the weights were made for: their shapes, and what gives their numbers a meaning.
_FIXED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("kv_channels", "normalization", "norm_epsilon", "swiglu", "position_embedding_type"),
    *("untie_embeddings_and_output_weights", "disable_bias_linear", "add_qkv_bias"),
    *("qk_layernorm", "vocab_size"),
)


def vocab_size_of(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """Tokens that the model knows: its own number, else the tokenizer's.

    Raises:
        ConfigError: the tokenizer has more.
    """
    size = tokenizer.vocab_size if model.vocab_size is None else model.vocab_size
    if tokenizer.vocab_size > size:
        rule = f"has {tokenizer.vocab_size} ids, the model knows {size}"
        flag = "--tokenizer-model" if tokenizer.path else "--tokenizer-type"
        value = tokenizer.path or tokenizer.kind
        raise ConfigError(flag, value, rule, "the tokenizer of the model")
    return size


def check_load_hf(config: Config) -> tuple[str, ...]:
    """Compares the folder of ``--load-hf`` with the run, headers of all its files included.

    Returns:
        what a person should know, for the start table.

    Raises:
        ConfigError: the folder is damaged, or a flag contradicts it.
    """
    folder = config.checkpoint.load_hf
    if folder is None:
        return ()
    if config.checkpoint.load is not None:
        rule = "starts a new run, --load goes on with one"
        raise ConfigError(FLAG, folder, rule, "one of the two")
    found, model = read_hf_config(folder), config.model
    for name in _FIXED:
        theirs, ours = getattr(found.model, name), getattr(model, name)
        if theirs != ours:
            flag = settings()[name].flag
            spelled = f"--no-{flag[2:]}" if ours is False else flag
            rule = f"contradicts the weights of {FLAG} {folder}"
            value = "" if isinstance(ours, bool) else ours
            works = "leave it out" if isinstance(theirs, bool) else f"{flag} {theirs}"
            raise ConfigError(spelled, value, rule, works)
    read_hf_weights(
        folder,
        model,
        vocab_size=found.vocab_size,
        padded_vocab_size=model.padded_vocab_size(found.vocab_size),
    )
    return tuple(_notes(config, found.max_positions))


def _notes(config: Config, max_positions: int) -> list[str]:
    folder, seq_length = config.checkpoint.load_hf, config.data.seq_length
    notes = [f"the weights of {folder} are where it starts"]
    if seq_length > max_positions and config.model.rope_type == "default":
        notes.append(
            f"the model was made for {max_positions:,} positions, rows have {seq_length:,}: "
            "--rope-type yarn --rope-scaling-factor would slow its angles down"
        )
    if config.data.tokenizer_type == "byte" and folder and not has_tokenizer(folder):
        notes.append(f"{folder} has no tokenizer: bytes are its tokens")
    return notes
