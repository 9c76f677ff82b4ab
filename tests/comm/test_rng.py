"""The seeds of dropout: stable numbers, different wherever masks must differ."""

from __future__ import annotations

from cp_megatron.comm.rng import attention_dropout_seed, hidden_dropout_seed


def test_the_seeds_never_change() -> None:
    # A changed value would change the masks of a resumed run.
    assert attention_dropout_seed(seed=1234, layer=0) == 5965371568734988384
    assert hidden_dropout_seed(seed=1234) == 3548241840072069339


def test_the_seeds_differ() -> None:
    seeds = {attention_dropout_seed(seed=seed, layer=n) for seed in (1, 2) for n in range(9)}
    seeds |= {hidden_dropout_seed(seed=seed) for seed in (1, 2)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)
