"""Runs a checked generation: loads the model and prints its answers."""

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
from cp_megatron.generate.check_generation import GenerationSetup
from cp_megatron.generate.decode import Sampling, Session
from cp_megatron.generate.dialogue import answer_lines, as_utf8, pieces, print_answer
from cp_megatron.model.transformer import Transformer


def run_generation(setup: GenerationSetup) -> int:
    """Continues the prompt, or each line of the input; returns the exit code 0.

    Raises:
        ConfigError: the device or the weights cannot be used, or a text cannot be continued.
    """
    device = _device(setup.config.train.device)
    if device.type == "cpu":
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
    responder = Responder(setup=setup, session=open_session(setup, device))
    prompt = setup.options.prompt
    if prompt is None:
        as_utf8(sys.stdin)
        answer_lines(responder.answer, source=sys.stdin, out=sys.stdout)
        return 0
    if setup.template is None:
        sys.stdout.write(prompt)
    print_answer(responder.answer(prompt), sys.stdout)
    return 0


@dataclass(frozen=True, kw_only=True)
class Responder:
    """Answers texts with the model.

    Attributes:
        setup: the checked generation.
        session: the model and the text so far.
        messages: the conversation so far, if there is a chat template.
    """

    setup: GenerationSetup
    session: Session
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, text: str) -> Iterator[str]:
        """Yields the continuation of ``text``, or in a chat the answer to it, piece by piece.

        Raises:
            ConfigError: the model does not have enough positions for the text, or the template
                refuses the conversation.
        """
        if self.setup.template is None:
            yield from self._continued(text)
            return
        before = len(self.messages)
        try:
            yield from self._answered(text)
        except ConfigError:
            del self.messages[before:]  # the conversation continues without the refused text
            raise

    def _answered(self, text: str) -> Iterator[str]:
        """Yields the answer to ``text``, and appends both to the conversation."""
        assert self.setup.template is not None
        self.messages.append({"role": "user", "content": text})
        try:
            conversation = self.setup.template(self.messages, True)
        except TemplateRefusalError as error:
            raise ConfigError("--chat", "", f"the chat template refuses: {error}") from None
        answer: list[str] = []
        try:
            for piece in self._continued(conversation):
                answer.append(piece)
                yield piece
        finally:  # after Ctrl-C, the conversation keeps the part that was printed
            self.messages.append({"role": "assistant", "content": "".join(answer).strip()})

    def _continued(self, text: str) -> Iterator[str]:
        setup, tokenizer, options = self.setup, self.setup.tokenizer, self.setup.options
        sampling = Sampling(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
        )
        # A chat template writes the opening tokens itself.
        opening = tokenizer.opening if setup.template is None else ()
        tokens = self.session.generate(
            [*opening, *tokenizer.encode(text).tolist()] or [tokenizer.eod],
            max_new_tokens=options.max_new_tokens,
            # The embedding can have rows that no token uses.
            stop={tokenizer.eod, *setup.ends, *range(tokenizer.vocab_size, setup.vocab_size)},
            sampling=sampling,
            seed=setup.config.train.seed,
        )
        return pieces(tokens, tokenizer)


def open_session(setup: GenerationSetup, device: torch.device) -> Session:
    """Loads the whole model on one device, in the dtype to compute in.

    Raises:
        ConfigError: the weights are damaged or of another model.
    """
    asked = setup.config.train.dtype
    if asked == "auto":
        asked = "bfloat16" if device.type == "cuda" else "float32"
    with torch.device("meta"):
        model = Transformer(
            setup.config.model,
            seq_length=setup.config.data.seq_length,
            vocab_size=setup.vocab_size,
            tp=None,
            sequence_parallel=False,
        )
    if setup.manifest is None:
        model = model.to(DTYPES[asked]).to_empty(device=device)
        load_hf(setup.folder, model=model)
    else:
        # Loading compares dtypes, so the model first gets the dtype of the checkpoint.
        model = model.to(DTYPES[_stored_dtype(setup)]).to_empty(device=device)
        load_checkpoint(setup.folder, model=model, optimizer=None)
    model = model.to(DTYPES[asked]).eval()
    return Session(model=model, seq_length=setup.config.data.seq_length)


def _stored_dtype(setup: GenerationSetup) -> str:
    assert setup.manifest is not None
    tensors = setup.manifest.tensors.items()
    stored = sorted({entry.dtype for name, entry in tensors if name.startswith("model.")})
    if len(stored) != 1:
        rule = f"holds weights of the dtypes {', '.join(stored) or 'none'}"
        raise ConfigError("--load", str(setup.folder), rule, "a checkpoint of one dtype")
    return stored[0]


def _device(asked: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if asked == "cuda" and not has_cuda:
        raise ConfigError("--device", asked, "this machine has no usable GPU", "--device cpu")
    return torch.device("cuda" if has_cuda and asked != "cpu" else "cpu")
