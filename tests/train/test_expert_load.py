"""The load of experts and of ranks, from the tokens of every expert."""

from __future__ import annotations

from cp_megatron.train.expert_load import ExpertLoads

NUMBERS = [0.5, 0.25, *(6, 2, 4, 4), *(1, 1, 1, 1)]
"""Two terms, and the tokens of four experts in two layers."""


def test_loads_are_means_of_the_layers() -> None:
    loads = ExpertLoads.of(NUMBERS, num_experts=4, num_ranks=2).metrics()
    assert (loads["moe_aux_loss"], loads["moe_z_loss"]) == (0.5, 0.25)
    assert loads["moe_counts"] == ((6, 2, 4, 4), (1, 1, 1, 1))
    assert loads["moe_expert_load"] == (6 / 4 + 1) / 2
    assert loads["moe_rank_load"] == 1  # ranks hold experts 0 and 1, and 2 and 3: 8 tokens each


def test_ranks_that_share_no_experts_have_no_load() -> None:
    assert ExpertLoads.of(NUMBERS, num_experts=4, num_ranks=1).metrics()["moe_rank_load"] is None
