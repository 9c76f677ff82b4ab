"""Continues a text token by token, greedily or by drawing. One rank, with a cache of the keys.

Drawing is that of transformers, in its order: scores are divided by the temperature, all but the
``top_k`` largest fall away, then the least likely ones whose sum is at most 1 - ``top_p`` (nucleus
sampling, Holtzman et al. 2019, arXiv:1904.09751).

Shapes: S tokens, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cp_megatron.cli.programs import check_sampling
from cp_megatron.errors import ConfigError
from cp_megatron.generate.key_value_cache import CachedRow, KeyValueCache
from cp_megatron.model.transformer import Transformer

PREFILL_TOKENS = 512
"""Tokens of a prompt computed at once: the logits of each are as wide as the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest; the other two are for drawing.
        top_k: draw among so many; 0 is all.
        top_p: draw among the likeliest whose probabilities reach this sum.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def probabilities(self, logits: Tensor) -> Tensor:
        """float64 [V]: what is drawn from; zero for what fell away. Needs a temperature above 0."""
        scores = logits.double() / self.temperature
        if 0 < self.top_k < len(scores):
            least = scores.topk(self.top_k).values[-1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(descending=True, stable=True)
            shares = ordered.softmax(-1)
            # A token stays while those before it have not reached the sum; so the first one does.
            gone = shares.cumsum(-1) - shares >= self.top_p
            scores = scores.masked_fill(gone[order.argsort()], -torch.inf)
        return scores.softmax(-1)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token of ``logits`` [V]; drawn on the CPU, so that every device draws alike.

        Raises:
            ConfigError: the model gives no numbers.
        """
        if not bool(logits.max().isfinite()):
            rule = "its weights give logits that are not finite"
            raise ConfigError("--load", "", rule, "a checkpoint from before it diverged")
        if self.temperature == 0:
            return int(logits.argmax())
        drawn = torch.multinomial(self.probabilities(logits.cpu()), 1, generator=generator)
        return int(drawn)


@dataclass(kw_only=True)
class Session:
    """A text that grows: the tokens the model has seen, and their keys.

    Attributes:
        model: whole on one rank, in eval mode, its weights plain tensors.
        seq_length: rows of the table of learned positions where the model's config leaves it open.
        tokens: those whose keys are in the cache.
    """

    model: Transformer
    seq_length: int
    tokens: list[int] = field(default_factory=list)
    _cache: KeyValueCache = field(default_factory=KeyValueCache, repr=False)

    @property
    def room(self) -> int | None:
        """Tokens that still fit; None where positions have no end."""
        config = self.model.config
        if config.position_embedding_type != "learned_absolute":
            return None
        return (config.max_position_embeddings or self.seq_length) - len(self.tokens)

    def keep(self, tokens: Sequence[int]) -> list[int]:
        """Forgets all but the beginning that is shared with ``tokens``; the rest of ``tokens``.

        At least one token is left over, whose logits say what comes next.
        """
        same = 0
        for ours, theirs in zip(self.tokens, tokens[:-1], strict=False):
            if ours != theirs:
                break
            same += 1
        self._cache.cut(same)
        del self.tokens[same:]
        return list(tokens[same:])

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Reads on; the logits [V] of what comes after the last of ``tokens`` (not empty).

        Raises:
            ConfigError: the model has no positions for so many.
        """
        room = self.room
        if room is not None and len(tokens) > room:
            total = len(self.tokens) + len(tokens)
            rule = f"the text has {total} tokens, the model has learned {room + len(self.tokens)}"
            raise ConfigError("--prompt", "", rule, "a shorter text")
        device = next(self.model.parameters()).device
        row_len = self._cache.length + len(tokens)
        logits = torch.empty(0)
        for start in range(0, len(tokens), PREFILL_TOKENS):
            part = list(tokens[start : start + PREFILL_TOKENS])
            window = self.model.config.row_window
            row = CachedRow(self._cache, len(part), row_len=row_len, window=window)
            logits = self.model(torch.tensor([part], device=device), cp=row)[0, -1]
            self._cache.length += len(part)
            self.tokens += part
        return logits

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop: Collection[int],
        sampling: Sampling,
        seed: int,
    ) -> Iterator[int]:
        """The tokens after ``prompt``, each as soon as it is known.

        Args:
            prompt: the whole text so far, not empty; what the session knows is not computed again.
            max_new_tokens: at most so many, and no more than there are positions for.
            stop: ends with the first of these, which is not given.
            sampling: how a token is chosen.
            seed: of the draws; they depend on nothing else.

        Raises:
            ConfigError: the model has no positions for the prompt.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        fresh = self.keep(prompt)
        for _ in range(max_new_tokens):
            token = sampling.choose(self.feed(fresh), generator)
            if token in stop:
                return
            yield token
            fresh = [token]
            if self.room == 0:
                return
