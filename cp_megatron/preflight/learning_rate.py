"""The learning rate as a pure function of how far the run is.

The formulas are those of Megatron-LM's ``OptimizerParamScheduler``. Step N, counted from 1, has the
rate that Megatron-LM computes when N steps are done, so that a warm-up does not begin with a step
that changes nothing, and the last step has the rate at which the decay ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cp_megatron.config import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The curve of the learning rate.

    All lengths have one unit: a step, or a row if the run is counted in rows.

    Attributes:
        config: the rates and the styles.
        warmup: the length of the warm-up.
        end: where the decay ends.
        anneal: the length of WSD's own decay, which ends there too.
        row: one row.
    """

    config: OptimizerConfig
    warmup: float
    end: float
    anneal: float
    row: float

    @classmethod
    def of(
        cls, config: OptimizerConfig, *, length: int, rows_per_step: int, in_rows: bool
    ) -> LearningRate:
        """The curve of a run.

        Args:
            config: the settings.
            length: of the whole run, in its unit.
            rows_per_step: rows of a global batch.
            in_rows: the unit is a row rather than a step.
        """

        def in_unit(steps: int | None, rows: int | None) -> float:
            if rows is not None:
                return rows if in_rows else rows / rows_per_step
            return (steps or 0) * (rows_per_step if in_rows else 1)

        end = in_unit(config.lr_decay_iters, config.lr_decay_samples) or length
        warmup = in_unit(config.lr_warmup_iters, config.lr_warmup_samples)
        if config.lr_warmup_fraction is not None:
            warmup = config.lr_warmup_fraction * end
        anneal = in_unit(config.lr_wsd_decay_iters, config.lr_wsd_decay_samples)
        row = 1 if in_rows else 1 / rows_per_step
        return cls(config=config, warmup=warmup, end=end, anneal=anneal, row=row)

    def at(self, done: float) -> float:
        """The learning rate of the step after which ``done`` of the run is done, above 0.

        It rises linearly from ``lr_warmup_init`` to ``lr``, then follows ``lr_decay_style``, and
        after ``end`` it is ``min_lr``, except that ``constant`` stays at ``lr`` for ever.
        """
        config = self.config
        peak, least, style = config.lr, config.min_lr, config.lr_decay_style
        if done <= self.warmup:
            first = config.lr_warmup_init
            return first + (peak - first) * done / self.warmup
        if style == "constant":
            return peak
        if done > self.end:
            return least
        if style == "inverse-square-root":
            rate = peak * math.sqrt(max(self.warmup, self.row)) / math.sqrt(done)
            return max(least, rate)
        if style == "WSD":
            passed = done - (self.end - self.anneal)
            share = _left(config.lr_wsd_decay_style, passed / self.anneal) if passed > 0 else 1.0
        else:
            share = _left(style, (done - self.warmup) / (self.end - self.warmup))
        return least + (peak - least) * share

    def is_zero(self, first: float, last: float) -> bool:
        """Whether the rate is 0 from ``first`` to ``last``, between which it rises, then falls."""
        places = (first, last, min(max(first, self.warmup), last))
        return not any(self.at(place) for place in places)


def _left(style: str, passed: float) -> float:
    """The share of the decay that is still to come, from 1 to 0, when ``passed`` of it is over."""
    if style == "linear":
        return 1.0 - passed
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * passed))
    if style == "exponential":
        return 2.0 * 0.5**passed - 1.0
    assert style == "minus_sqrt", style
    return 1.0 - math.sqrt(passed)
