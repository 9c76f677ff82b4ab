"""From a checked generation to its text. The first module on that path that imports torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.shard_writer import DTYPES
from cp_megatron.data.tokenize.chat_template import TemplateRefusalError
from cp_megatron.errors import ConfigError
from cp_megatron.generate.check_generation import GenerationPlan
from cp_megatron.generate.decode import Sampling, Session
from cp_megatron.generate.dialogue import as_utf8, pieces, speak, talk
from cp_megatron.model.transformer import Transformer


def run_generation(plan: GenerationPlan) -> int:
    """Continues the prompt, or each line of the input; the exit code 0.

    Raises:
        ConfigError: something that only torch or the weights could tell.
    """
    device = _device(plan.config.train.device)
    if device.type == "cpu":
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
    speaker = Speaker(plan=plan, session=open_session(plan, device))
    prompt = plan.options.prompt
    if prompt is None:
        as_utf8(sys.stdin)
        talk(speaker.answer, source=sys.stdin, out=sys.stdout)
        return 0
    if plan.template is None:
        sys.stdout.write(prompt)
    speak(speaker.answer(prompt), sys.stdout)
    return 0


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """Answers a person.

    Attributes:
        plan: says how.
        session: with the model.
        messages: of the conversation so far, with a chat template.
    """

    plan: GenerationPlan
    session: Session
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, words: str) -> Iterator[str]:
        """The continuation of ``words``, or the answer to them, piece by piece.

        Raises:
            ConfigError: the text is longer than the model has positions, or the template refuses
                the conversation.
        """
        if self.plan.template is None:
            yield from self._continued(words)
            return
        before = len(self.messages)
        try:
            yield from self._answered(words)
        except ConfigError:
            del self.messages[before:]  # words that could not be read were not said
            raise

    def _answered(self, words: str) -> Iterator[str]:
        """The answer to ``words``, and both of them in the conversation."""
        assert self.plan.template is not None
        self.messages.append({"role": "user", "content": words})
        try:
            text = self.plan.template(self.messages, True)
        except TemplateRefusalError as error:
            raise ConfigError("--chat", "", f"the chat template refuses: {error}") from None
        said: list[str] = []
        try:
            for piece in self._continued(text):
                said.append(piece)
                yield piece
        finally:  # what was said before Ctrl-C was said
            self.messages.append({"role": "assistant", "content": "".join(said).strip()})

    def _continued(self, text: str) -> Iterator[str]:
        plan, tokenizer, options = self.plan, self.plan.tokenizer, self.plan.options
        sampling = Sampling(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
        )
        # A chat template writes the beginning of a text itself.
        opening = tokenizer.opening if plan.template is None else ()
        tokens = self.session.generate(
            [*opening, *tokenizer.encode(text).tolist()] or [tokenizer.eod],
            max_new_tokens=options.max_new_tokens,
            # Rows of the embedding that no token has are no text.
            stop={tokenizer.eod, *plan.ends, *range(tokenizer.vocab_size, plan.vocab_size)},
            sampling=sampling,
            seed=plan.config.train.seed,
        )
        return pieces(tokens, tokenizer)


def open_session(plan: GenerationPlan, device: torch.device) -> Session:
    """The trained model on one device, whole, in the type it is asked to compute in.

    Raises:
        ConfigError: the weights are damaged or of another model.
    """
    asked = plan.config.train.dtype
    if asked == "auto":
        asked = "bfloat16" if device.type == "cuda" else "float32"
    with torch.device("meta"):
        model = Transformer(
            plan.config.model,
            seq_length=plan.config.data.seq_length,
            vocab_size=plan.vocab_size,
            tp=None,
            sequence_parallel=False,
        )
    if plan.manifest is None:
        model = model.to(DTYPES[asked]).to_empty(device=device)
        load_hf(plan.folder, model=model)
    else:
        # In the type it was saved in, which is compared: nothing is rounded unasked.
        model = model.to(DTYPES[_stored_dtype(plan)]).to_empty(device=device)
        load_checkpoint(plan.folder, model=model, optimizer=None)
    model = model.to(DTYPES[asked]).eval()
    return Session(model=model, seq_length=plan.config.data.seq_length)


def _stored_dtype(plan: GenerationPlan) -> str:
    assert plan.manifest is not None
    tensors = plan.manifest.tensors.items()
    stored = sorted({entry.dtype for name, entry in tensors if name.startswith("model.")})
    if len(stored) != 1:
        rule = f"holds weights of the types {', '.join(stored) or 'none'}"
        raise ConfigError("--load", str(plan.folder), rule, "a checkpoint of one type")
    return stored[0]


def _device(asked: str) -> torch.device:
    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise ConfigError("--device", asked, "there is no GPU here", "--device cpu")
    return torch.device("cuda" if found and asked != "cpu" else "cpu")
