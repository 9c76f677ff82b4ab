"""The one file that imports Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cp_megatron.errors import ConfigError


def import_transformers(flag: str, value: object) -> ModuleType:
    """The package transformers.

    Args:
        flag: the flag or argument that needs the package, for the error message.
        value: its value.

    Raises:
        ConfigError: transformers is not installed, or older than 5.0.
    """
    try:
        import transformers

        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError("too old")
    except ImportError as error:
        rule = "needs the package transformers, 5.0 or newer"
        raise ConfigError(flag, value, rule, "pip install 'transformers>=5.0'") from error
    return transformers


def gguf_tensors(
    path: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Decodes the tensors of a GGUF file.

    ``from_pretrained(gguf_file=...)`` would do the same, but it needs the package accelerate as
    well, and transformers refuses to save the model that it returns.

    Args:
        path: the file.
        config: the model's config.json.

    Returns:
        float32 tensors by their names in transformers, and the shape that ``config`` gives each
        parameter of the model.

    Raises:
        ConfigError: transformers is not installed, or older than 5.0.
    """
    library = import_transformers("--from-gguf", path)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    own_config = library.AutoConfig.for_model(**deepcopy(dict(config)))  # it changes its values
    with torch.device("meta"):
        model = library.AutoModelForCausalLM.from_config(own_config)
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return read["tensors"], shapes


def gguf_tokenizer(path: Path) -> tuple[str, dict[str, str], str | None]:
    """Builds the tokenizer of a GGUF file: tokenizer.json, its special tokens, its chat template.

    Raises:
        ConfigError: transformers is not installed, or older than 5.0.
    """
    library = import_transformers("--from-gguf", path)
    fast = library.PreTrainedTokenizerFast
    # In the file's own folder, transformers would prefer a tokenizer.json.
    with TemporaryDirectory() as alone:
        Path(alone, "model.gguf").symlink_to(path.resolve())
        tokenizer = fast.from_pretrained(alone, gguf_file="model.gguf")
    text = tokenizer.backend_tokenizer.to_str()
    return text, dict(tokenizer.special_tokens_map), tokenizer.chat_template
