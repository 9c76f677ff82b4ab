"""Runs a checked generation: loads the model and prints its answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from cp_megatron.checkpoint.hf_load import load_hf
from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.shard_writer import DTYPES
from cp_megatron.comm.runtime import Launch
from cp_megatron.data.tokenize.chat_template import TemplateRefusalError
from cp_megatron.errors import ConfigError
from cp_megatron.generate.check_generation import GenerationSetup
from cp_megatron.generate.decode import Sampling, Session
from cp_megatron.generate.dialogue import answer_lines, as_utf8, pieces, print_answer
from cp_megatron.model.transformer import Transformer
from cp_megatron.preflight.run_plan import DeviceName, dtype_on
from cp_megatron.preflight.start import choose_device, start_torch


def run_generation(setup: GenerationSetup) -> int:
    """Continues the prompt, or each line of the input; returns the exit code 0.

    Raises:
        ConfigError: the device or the weights cannot be used, or a text cannot be continued.
    """
    device, _ = choose_device(setup.config.train.device, num_ranks=1)
    start_torch(Launch(), device, deterministic=False)
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
        user, reply = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
        try:
            conversation = self.setup.template([*self.messages, user], True)
        except TemplateRefusalError as error:
            raise ConfigError("--chat", "", f"the chat template refuses: {error}") from None
        self.messages.extend((user, reply))
        answer = ""
        try:
            for piece in self._continued(conversation):
                answer += piece
                reply["content"] = answer.strip()  # after Ctrl-C, the printed part is kept
                yield piece
        except ConfigError:
            del self.messages[-2:]  # the conversation continues without the refused text
            raise

    def _continued(self, text: str) -> Iterator[str]:
        setup, tokenizer, options = self.setup, self.setup.tokenizer, self.setup.options
        temperature, top_k, top_p = options.temperature, options.top_k, options.top_p
        # A chat template writes the opening tokens itself.
        opening = tokenizer.opening if setup.template is None else ()
        tokens = self.session.generate(
            [*opening, *tokenizer.encode(text).tolist()] or [tokenizer.eod],
            max_new_tokens=options.max_new_tokens,
            # The embedding can have rows that no token uses.
            stop={tokenizer.eod, *setup.ends, *range(tokenizer.vocab_size, setup.vocab_size)},
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
            seed=setup.config.train.seed,
        )
        return pieces(tokens, tokenizer)


def open_session(setup: GenerationSetup, device: DeviceName) -> Session:
    """Loads the whole model on one device, in the dtype to compute in.

    Raises:
        ConfigError: the weights are damaged or of another model.
    """
    dtype = stored = dtype_on(setup.config, device)
    with torch.device("meta"):
        model = Transformer(
            setup.config.model,
            seq_length=setup.config.data.seq_length,
            vocab_size=setup.vocab_size,
            tp=None,
            sequence_parallel=False,
        )
    if setup.manifest is not None:
        # Loading compares dtypes, so the model first gets the dtype of the checkpoint.
        weights = (x for name, x in setup.manifest.tensors.items() if name.startswith("model."))
        stored = next((entry.dtype for entry in weights), dtype)
    model = model.to(DTYPES[stored]).to_empty(device=device)
    if setup.manifest is None:
        load_hf(setup.folder, model=model)
    else:
        load_checkpoint(setup.folder, model=model, optimizer=None)
    model = model.to(DTYPES[dtype]).eval()
    return Session(model=model, seq_length=setup.config.data.seq_length)
