"""Generates tokens one by one, greedily or by sampling, with a cache of the keys, on one rank.

Sampling follows transformers in the same order: the scores are divided by the temperature; only the
``top_k`` largest are kept; then the least likely tokens whose probabilities sum to at most
1 - ``top_p`` are removed (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751).

Shapes: V = padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from cp_megatron.errors import ConfigError
from cp_megatron.generate.key_value_cache import CachedRow, KeyValueCache
from cp_megatron.model.transformer import Transformer
from cp_megatron.plan import Mask

PREFILL_TOKENS = 512
"""The number of prompt tokens per forward pass, which limits the memory of the logits."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; a larger value samples.
        top_k: sample from this many most likely tokens; 0 means all.
        top_p: sample from the most likely tokens whose probabilities reach this sum.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns float64 [V], zero for removed tokens. The temperature must be above 0."""
        scores = logits.double() / self.temperature
        if 0 < self.top_k < len(scores):
            least = scores.topk(self.top_k).values[-1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(descending=True, stable=True)
            shares = ordered.softmax(-1)
            # A token is kept if the tokens before it have not reached the sum; the first one is.
            removed = shares.cumsum(-1) - shares >= self.top_p
            scores = scores.masked_fill(removed[order.argsort()], -torch.inf)
        return scores.softmax(-1)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Chooses a token from ``logits`` [V]. It samples on the CPU, to be equal on every device.

        Raises:
            ConfigError: the logits are not finite.
        """
        if not bool(logits.max().isfinite()):
            rule = "its weights give logits that are not finite"
            raise ConfigError("--load", "", rule, "a checkpoint from before training diverged")
        if self.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(self.probabilities(logits.cpu()), 1, generator=generator))


@dataclass(kw_only=True)
class Session:
    """A growing text: the tokens that the model has seen, and their keys and values.

    Attributes:
        model: the whole model on one rank, in eval mode, with plain tensors as weights.
        seq_length: the number of learned positions if the model's config does not say it.
        tokens: the tokens whose keys are in the cache.
    """

    model: Transformer
    seq_length: int
    tokens: list[int] = field(default_factory=list)
    _cache: KeyValueCache = field(default_factory=KeyValueCache, repr=False)

    @property
    def num_free(self) -> int | None:
        """The number of positions that are left; None if it is unlimited."""
        config = self.model.config
        if config.position_embedding_type != "learned_absolute":
            return None
        return (config.max_position_embeddings or self.seq_length) - len(self.tokens)

    def keep(self, tokens: Sequence[int]) -> list[int]:
        """Keeps the longest common prefix with ``tokens``, and returns the rest of ``tokens``.

        A model with recurrences keeps all tokens or none. At least one token is returned, because
        its logits are needed for the next token.
        """
        pairs = zip(self.tokens, tokens[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        same = self._cache.cut(same)
        del self.tokens[same:]
        return list(tokens[same:])

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Appends ``tokens`` (not empty) to the text; returns the logits [V] of the next token.

        Raises:
            ConfigError: the model does not have enough positions.
        """
        num_free, known = self.num_free, len(self.tokens)
        if num_free is not None and len(tokens) > num_free:
            total, learned = known + len(tokens), known + num_free
            rule = f"the text has {total} tokens, but the model has learned {learned} positions"
            raise ConfigError("--prompt", "", rule, "a shorter text")
        device = next(self.model.parameters()).device
        mask = Mask.causal(self._cache.length + len(tokens), self.model.config.row_window)
        logits = torch.empty(0)
        for start in range(0, len(tokens), PREFILL_TOKENS):
            part = list(tokens[start : start + PREFILL_TOKENS])
            row = CachedRow(self._cache, len(part), mask)
            logits = self.model(torch.tensor([part], device=device), cp=row)[0, -1]
            self._cache.states.commit()
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
        """Yields the tokens after ``prompt`` one by one.

        Args:
            prompt: the whole text so far, not empty; a prefix that is in the cache is reused.
            max_new_tokens: the largest number of tokens; also limited by the positions left.
            stop: tokens that end the text; they are not yielded.
            sampling: how a token is chosen.
            seed: determines the samples.

        Raises:
            ConfigError: the model does not have enough positions for the prompt.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        fresh = self.keep(prompt)
        for _ in range(max_new_tokens):
            token = sampling.choose(self.feed(fresh), generator)
            if token in stop:
                return
            yield token
            fresh = [token]
            if self.num_free == 0:
                return
