"""Tiny models of transformers with loud weights, and what transformers computes with them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from cp_megatron.data.batch.batch import IGNORED, Batch
from cp_megatron.plan.mask import Mask, Window
from tests.families.case import VOCAB
from tests.families.cases import CASES

LENGTHS = (5, 26, 17)
"""Documents of a row, in tokens: shorter and longer than every window and original length."""
SEQ = sum(LENGTHS)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What transformers computes with a case, in float32 with its eager attention.

    Attributes:
        folder: the model as transformers saves it.
        logits: [1, SEQ, VOCAB].
        gradients: those of the mean loss, by the names of the folder.
    """

    folder: Path
    logits: Tensor
    gradients: Mapping[str, Tensor]


def cases_of(model_type: str) -> list[str]:
    """The names of a family's cases."""
    return [name for name in CASES if name.partition(",")[0] == model_type]


def make_config(name: str, **changes: Any) -> Any:
    """The config of a case, as an object of transformers."""
    case = CASES[name]
    maker = getattr(importlib.import_module("transformers"), f"{case.name}Config")
    return maker(**{**case.sizes, **case.options, **changes}, attn_implementation="eager")


def make_model(name: str, config: Any = None) -> Any:
    """The model of a case, always with the same loud weights."""
    case, config = CASES[name], config or make_config(name)
    library = importlib.import_module("transformers")
    model = getattr(library, case.model_class or f"{case.name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(loud(key, weight, one_plus=case.one_plus, generator=generator))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model.eval()


def loud(key: str, weight: Tensor, *, one_plus: bool, generator: torch.Generator) -> Tensor:
    """Values so large that the logits differ if a bias, a norm or a factor is left out.

    The scores of attention have a standard deviation of 1 to 3.
    """
    drawn = torch.randn(weight.shape, generator=generator)
    if key.endswith("A_log"):  # memories of 10 to 1,000 tokens
        return torch.empty(weight.shape).uniform_(0.001, 0.1, generator=generator).log()
    if key.endswith("bias"):
        return drawn * 0.5
    if "norm" in key or "ln_" in key:
        return torch.rand(weight.shape, generator=generator) + (-0.5 if one_plus else 0.5)
    if any(part in key for part in ("embed", "wte", "wpe")):
        return drawn * 0.6
    if key.endswith("sinks"):
        return drawn
    # GPT-2 multiplies from the right, and experts are stacked.
    fan_in = weight.shape[0 if ".c_" in key else -1 if ".experts." in key else 1]
    return drawn * 1.3 * fan_in**-0.5


def row(number: int = 0, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Tokens and labels [1, SEQ] of packed documents; the last token of each has no label."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCAB, (1, sum(lengths)), generator=generator)
    labels = tokens.roll(-1, 1)
    ends = torch.tensor(lengths).cumsum(0) - 1
    labels[:, ends] = IGNORED
    return tokens, labels


def batch(window: Window | None, number: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """The row as the trainer makes it."""
    tokens, labels = row(number, lengths)
    mask = Mask.documents(lengths, window=window)
    return Batch(tokens=tokens, labels=labels, mask=mask, first_row=number, row_length=SEQ)


def logits_of(model: Any) -> Tensor:
    """Logits [1, SEQ, VOCAB] of the row, from one call for each document.

    If the longest sequence of a call decides the frequencies, all documents are in one call, and
    positions that restart separate them. (Not all families read such positions.)
    """
    tokens = row()[0]
    rope = model.config.to_dict().get("rope_parameters") or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        packed: Tensor = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return packed
    pieces = tokens.split(LENGTHS, 1)
    return torch.cat([model(input_ids=piece, use_cache=False).logits for piece in pieces], 1)


def refer(name: str, root: Path) -> Reference:
    """Saves a case and runs it. Saving the gradients, too, gives them the names of the folder."""
    model = make_model(name)
    folder = root / "model"
    # Every second model is saved in shards.
    shard = "30KB" if list(CASES).index(name) % 2 else "1GB"
    model.save_pretrained(folder, max_shard_size=shard)
    logits = logits_of(model)
    cross_entropy(logits.flatten(0, 1), row()[1].flatten(), ignore_index=IGNORED).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(root / "gradients")
    return Reference(
        folder=folder, logits=logits.detach(), gradients=tensors_of(root / "gradients")
    )


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {
        key: value
        for file in sorted(folder.glob("*.safetensors"))
        for key, value in load_file(file).items()
    }
