"""Checks a run that starts from a Hugging Face folder. This module does not import torch."""

from __future__ import annotations

from cp_megatron.checkpoint.hf_folder import find_weights
from cp_megatron.config import Config, ModelConfig
from cp_megatron.data.tokenize.tokenizer import Tokenizer, words_for
from cp_megatron.errors import ConfigError
from cp_megatron.families.json_fields import FLAG
from cp_megatron.families.registry import TRAINING_ONLY, has_tokenizer, read_hf_config, spelled
from cp_megatron.families.rope_fields import ROPE_FIELDS

# A run may change these flags, some of them to extend the context.
_CHANGEABLE = TRAINING_ONLY | ROPE_FIELDS
_CHANGEABLE |= {"rope_type", "rotary_base", "window_size", "window_layers"}


def vocab_size_of(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """Returns the number of tokens that the model knows: its own, or else the tokenizer's.

    Raises:
        ConfigError: the tokenizer has more.
    """
    size = tokenizer.vocab_size if model.vocab_size is None else model.vocab_size
    if tokenizer.vocab_size > size:
        rule = f"has {tokenizer.vocab_size} ids, but the model knows only {size}"
        raise ConfigError(*words_for(tokenizer), rule, "the tokenizer of the model")
    return size


def check_load_hf(config: Config) -> tuple[str, ...]:
    """Compares the folder of ``--load-hf``, including the headers of all its files, with the run.

    Returns:
        notes for the start table.

    Raises:
        ConfigError: the folder is damaged, or a flag contradicts it.
    """
    folder = config.checkpoint.load_hf
    if folder is None:
        return ()
    if config.checkpoint.load is not None:
        rule = f"starts a new run, but --load {config.checkpoint.load} continues one"
        raise ConfigError(FLAG, folder, rule, "one of the two")
    pretrained, model = read_hf_config(folder), config.model
    for name, ours in vars(model).items():
        theirs = getattr(pretrained.model, name)
        if theirs != ours and name not in _CHANGEABLE:
            rule = f"contradicts the weights of {FLAG} {folder}"
            works = f"leave it out, or {spelled(name, theirs)}"
            raise ConfigError(spelled(name, ours), "", rule, works)
    padded = model.padded_vocab_size(pretrained.vocab_size)
    find_weights(pretrained, model, padded_vocab_size=padded)
    max_positions, seq_length = (
        pretrained.model.max_position_embeddings or 0,
        config.data.seq_length,
    )
    notes = [f"training starts from the weights of {folder}"]
    if pretrained.is_part:
        notes.append(f"only the language model of {pretrained.family.container} is read and saved")
    if pretrained.unread:
        reader = f"neither transformers' {pretrained.family.architecture} nor this program reads"
        notes.append(f"config.json has entries that {reader}: {', '.join(pretrained.unread)}")
    for key in ("router_aux_loss_coef", "aux_loss_alpha"):
        if model.num_experts and pretrained.raw.get(key) and not model.moe_aux_loss_coeff:
            rule = "none is used without --moe-aux-loss-coeff"
            notes.append(f"config.json names {key} {pretrained.raw[key]}; {rule}")
    if seq_length > max_positions and model.rope_type == "default":
        notes.append(
            f"the model was made for {max_positions:,} positions, but rows have {seq_length:,}: "
            "--rope-type yarn --rope-scaling-factor would adapt its rotary embeddings"
        )
    if config.data.tokenizer_type == "byte" and not has_tokenizer(folder):
        notes.append(f"{folder} has no tokenizer, so bytes are the tokens")
    return tuple(notes)
