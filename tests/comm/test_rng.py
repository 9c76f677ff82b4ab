"""The seeds of dropout: stable numbers, different wherever masks must differ."""

from __future__ import annotations

import itertools

import torch

from cp_megatron.comm.rng import attention_dropout_seed, dropout_seed, seed_dropout


def test_the_seed_never_changes() -> None:
    # A changed value would change the masks of a resumed run.
    assert dropout_seed(seed=1234, step=5, microbatch=0, dp=0, cp=1) == 4692870899489041887
    assert dropout_seed(seed=1234, step=5, microbatch=0, dp=0, cp=1, tp=None) == 4692870899489041887


def test_every_coordinate_changes_it() -> None:
    places = list(itertools.product((1, 2), (0, 1), (0, 1), (0, 1), (0, 1), (None, 0, 1)))
    seeds = {
        dropout_seed(seed=seed, step=step, microbatch=microbatch, dp=dp, cp=cp, tp=tp)
        for seed, step, microbatch, dp, cp, tp in places
    }
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_seed_of_a_layers_attention_dropout_never_changes() -> None:
    assert attention_dropout_seed(seed=1234, layer=0) == 5965371568734988384
    seeds = {attention_dropout_seed(seed=seed, layer=n) for seed in (1, 2) for n in range(9)}
    assert len(seeds) == 18


def test_seeding_repeats_a_mask() -> None:
    dropout, x = torch.nn.Dropout(0.5), torch.ones(64)
    masks = []
    for seed in (7, 8, 7):
        seed_dropout(seed, torch.device("cpu"))
        masks.append(dropout(x))
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
