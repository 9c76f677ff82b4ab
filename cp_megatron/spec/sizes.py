"""The sizes that the activations of a micro batch on one rank are products of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cp_megatron.plan.heads import HeadExchange


class KeptStates(NamedTuple):
    """What a recurrence keeps on a rank besides its tokens.

    Attributes:
        pieces: the rank's pieces that a state enters, each with this state.
        transitions: those of all ranks' pieces, for each head whose chains the rank follows.
        heads: number of these heads.
        halo: tokens of other ranks that its convolution reads.
    """

    pieces: int = 0
    transitions: int = 0
    heads: int = 0
    halo: int = 0


ON_ONE_RANK = KeptStates()


@dataclass(frozen=True, kw_only=True)
class ActivationSizes:
    """The sizes from which a block computes how many bytes it keeps for backward.

    Attributes:
        batch: rows of the micro batch.
        row_tokens: tokens of a row on this context parallel rank.
        tp: tensor parallel size.
        splits_sequence: the residual stream is split over the tp ranks (sequence parallelism).
        element: bytes of an element of the activations.
        exact: bytes of an element of the type that sums are computed in.
        on_cuda: the device is a GPU; its operations keep other tensors than the CPU's.
        head_exchange: the exchange of heads for tokens by all-to-all, if attention does one.
        sends_latents: latent attention sends latents, and so keeps them instead of the heads that
            they expand to.
        result_copies: copies of attention's result that are kept; 2 if the output projection
            needs it in another memory layout.
        states: what recurrences keep; by default what they keep on one rank.
        ep: ranks that share experts.
        rows: rows of the run in the micro batch, over which experts are balanced.
    """

    batch: int
    row_tokens: int
    tp: int
    splits_sequence: bool
    element: int
    exact: int
    on_cuda: bool
    head_exchange: HeadExchange | None = None
    sends_latents: bool = False
    result_copies: int = 1
    states: KeptStates = ON_ONE_RANK
    ep: int = 1
    rows: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that column parallel layers compute."""
        return self.batch * self.row_tokens

    @property
    def stream_tokens(self) -> int:
        """Tokens of the residual stream on this rank."""
        return self.batch * (self.row_tokens // (self.tp if self.splits_sequence else 1))

    def stream_bytes(self, width: int) -> int:
        """Bytes of the residual stream on this rank."""
        return self.stream_tokens * width * self.element
