"""Which causal families of transformers compute on several ranks what they compute on one?

Prints one JSON line per family, with the hardware. Each family runs in the adapter and, if the
trainer loads it (``--load-hf``), in the trainer.

The adapter: the model is tiny, made from the default config of the family, in float64. Two ranks
run it with ``attn_implementation="cp_megatron"``, on one document and on seven packed ones; one
rank runs it with transformers' own attention, document by document. The result is one of:

- ``equal``: logits and the gradients of all parameters agree to 1e-8; ``errors`` are the largest.
  What a model casts to float32 itself is computed in float64 here, on one rank and on two;
- ``refused``: ``huggingface.check`` or the attention refused it, with the reason;
- ``wrong`` or ``crashed``: a fault of ours, of which there must be none;
- ``lacks``: the family needs a package that is not installed.

The trainer (``trainer``): tiny models, in which every optional field differs from its default,
start from folders that transformers saved and read a row of packed documents. The line has the loss
and the largest relative differences: of loss and gradients on CP2 and on TP2 x CP2 to one rank, in
float64, and of logits and gradients on TP2 x CP2 to transformers' eager attention, in float32.

The last line counts the results.

    python benchmarks/families.py                      # all of them, several minutes
    python benchmarks/families.py --only llama bart
    python benchmarks/families.py --accepted           # those that the trainer loads
    python benchmarks/families.py --quick              # three families
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.teams import hardware

from cp_megatron.config.words import read_options
from cp_megatron.errors import ConfigError
from tests.families.trainer_row import accepted, measure_family
from tests.model.family_table import causal_families, try_family
from tests.ranks import RanksFailed

QUICK = ("llama", "bart", "mamba")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Causal families of transformers on two ranks."""

    only: tuple[str, ...] = ()
    """Model types to run; by default all."""
    accepted: bool = False
    """Run only the families that the trainer loads."""
    quick: bool = False
    """Run three families, which show that the script runs."""


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    machine = hardware()
    if find_spec("transformers") is None:
        print(json.dumps({"benchmark": "families", "result": "lacks", "hardware": machine}))
        return
    families = causal_families()
    chosen = arguments.only or (QUICK if arguments.quick else tuple(families))
    if unknown := set(chosen) - families.keys():
        sys.exit(f"transformers has no causal family {', '.join(sorted(unknown))}")
    if arguments.accepted:
        chosen = tuple(family for family in chosen if family in accepted())
    counts: Counter[str] = Counter()
    for family in chosen:
        outcome = try_family(family, families[family])
        counts[outcome.result] += 1
        line = {"benchmark": "families", **asdict(outcome)}
        if family in accepted():
            line["trainer"] = in_trainer(family)
            counts["wrong in the trainer"] += "failed" in line["trainer"]
        print(json.dumps({**line, "hardware": machine}), flush=True)
    total = {"benchmark": "families", "transformers": version("transformers"), **counts}
    print(json.dumps({**total, "hardware": machine}), flush=True)


def in_trainer(family: str) -> dict[str, Any]:
    """Returns the fields of ``TrainerRow``, or ``failed`` with an error, a fault of ours."""
    with TemporaryDirectory() as folder:
        try:
            return asdict(measure_family(family, Path(folder)))
        except (RanksFailed, ConfigError) as error:
            return {"failed": str(error)}


if __name__ == "__main__":
    main()
