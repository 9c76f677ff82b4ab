"""The rules of the optimizer and of the learning rate's schedule, and notes about odd ones."""

from __future__ import annotations

from collections.abc import Iterator

from cp_megatron.config import OptimizerConfig
from cp_megatron.config.fields import settings
from cp_megatron.errors import ConfigError
from cp_megatron.preflight.rules import refuse_unused
from cp_megatron.preflight.run_length import length_flag
from cp_megatron.preflight.run_plan import RunPlan

_DECAY = ("--lr-decay-iters", "--lr-decay-samples", "--min-lr")
_MUON = (
    *("muon_momentum", "muon_nesterov", "muon_scale_mode", "muon_extra_scale_factor"),
    *("muon_coefficient_type", "muon_num_ns_steps"),
)
_WSD = ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples")


def check_schedule(optimizer: OptimizerConfig, given: frozenset[str]) -> None:
    """The rates and the style fit one another, and each flag that is typed has an effect.

    Raises:
        ConfigError: otherwise.
    """
    if optimizer.optimizer != "muon":
        reason = f"with --optimizer {optimizer.optimizer}"
        refuse_unused(optimizer, _MUON, given, reason=reason, works="--optimizer muon")
    style = optimizer.lr_decay_style
    ends = {"--min-lr": optimizer.min_lr, "--lr-warmup-init": optimizer.lr_warmup_init}
    for flag, rate in ends.items():
        if rate > optimizer.lr:
            rule = f"must be at most --lr {optimizer.lr:g}"
            raise ConfigError(flag, rate, rule, f"{optimizer.lr / 10:g}")
    if style != "WSD":
        reason, works = f"with --lr-decay-style {style}", "--lr-decay-style WSD"
        refuse_unused(optimizer, _WSD, given, reason=reason, works=works)
    elif optimizer.lr_wsd_decay_iters is None and optimizer.lr_wsd_decay_samples is None:
        works = "--lr-wsd-decay-iters 100 with it"
        raise ConfigError("--lr-decay-style", style, "needs the length of WSD's decay", works)


def check_units(optimizer: OptimizerConfig, given: frozenset[str]) -> None:
    """A command line counts everything in steps or everything in rows, as Megatron-LM demands.

    What a preset or a file counts in the other unit is converted.

    Raises:
        ConfigError: the command line mixes them.
    """
    units = ("--train-iters", "iters", "samples"), ("--train-samples", "samples", "iters")
    for length, here, there in units:
        for part in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
            row = settings()[f"{part}_{there}"]
            value = getattr(optimizer, row.name)
            if value and {length, row.flag} <= given:
                rule = f"counts in another unit than {length}"
                raise ConfigError(row.flag, value, rule, settings()[f"{part}_{here}"].flag)


def check_warmup(plan: RunPlan, given: frozenset[str]) -> None:
    """A warm-up that the command line asks for is over before the decay is.

    Without such a flag, a short run of a preset with a longer warm-up may end while the learning
    rate still rises; ``schedule_notes`` says so.

    Raises:
        ConfigError: the warm-up is as long as the decay's end, or longer.
    """
    curve, optimizer = plan.learning_rate, plan.config.optimizer
    unit = "iters" if optimizer.lr_warmup_samples is None else "samples"
    typed = {f"--lr-{part}-{each}" for part in ("warmup", "decay") for each in ("iters", "samples")}
    if curve.warmup < curve.end or not typed & given:
        return
    flag, value = length_flag(plan)
    for name in ("lr_decay_iters", "lr_decay_samples"):
        if (end := getattr(optimizer, name)) is not None:
            flag, value = settings()[name].flag, str(end)
    row = settings()[f"lr_warmup_{unit}"]
    warmup = getattr(optimizer, row.name)
    works = int(warmup * curve.end / curve.warmup) // 10
    raise ConfigError(row.flag, warmup, f"must be below {flag} {value}", str(works))


def schedule_notes(plan: RunPlan, given: frozenset[str]) -> Iterator[str]:
    """Notes about a learning rate that is possible but hardly wanted."""
    curve, in_rows = plan.learning_rate, plan.counts_rows
    unread = [flag for flag in _DECAY if flag in given]
    if unread and curve.config.lr_decay_style == "constant":
        have = "has" if len(unread) == 1 else "have"
        yield f"{' and '.join(unread)} {have} no effect with --lr-decay-style constant"
    first, last = (plan.progress_after(step) for step in (plan.load_step + 1, plan.last_step))
    unit = "rows" if in_rows else "steps"
    warmup, end, anneal = (f"{x:,.10g}" for x in (curve.warmup, curve.end, curve.anneal))
    if curve.is_zero(first, last):
        later = "--lr-decay-samples" if in_rows else "--lr-decay-iters"
        yield (
            f"the learning rate is 0 in every step, because its decay ends after {end} {unit} "
            f"(works: --min-lr above 0, or a larger {later})"
        )
    elif curve.warmup >= last:
        yield (
            f"the warm-up of {warmup} {unit} is not over before the run ends after {last:,}: the "
            f"learning rate rises to {curve.at(last):.3g}, --lr is {curve.config.lr:g}"
        )
    if curve.config.lr_decay_style == "WSD" and curve.warmup + curve.anneal > curve.end:
        yield (
            f"WSD's decay of {anneal} {unit} begins before the warm-up of {warmup} ends: the "
            "learning rate drops at once where the warm-up ends"
        )
