"""Everything that can be known before torch is imported: is this run possible, and what is it?

``check`` takes a configuration and a launch and gives the plan of the run, or a ``ConfigError``
that names flag, value, rule and what works. It reads a few kilobytes of the data and of the
checkpoint, sends nothing, makes nothing.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from cp_megatron.comm.runtime import Launch
from cp_megatron.config import Config
from cp_megatron.config.fields import check_values
from cp_megatron.data.rows.corpora import check_data
from cp_megatron.data.tokenize.tokenizer import open_tokenizer
from cp_megatron.errors import ConfigError
from cp_megatron.faults.inject import parse_faults
from cp_megatron.kernels.select import KernelChoice, select_kernel
from cp_megatron.plan import Grid, Mask
from cp_megatron.preflight import rules
from cp_megatron.preflight.log_rules import check_log
from cp_megatron.preflight.pretrained import check_load_hf, vocab_size_of
from cp_megatron.preflight.rope_rules import check_rope
from cp_megatron.preflight.save_and_load import check_goes_on, check_save, data_changes, find_load
from cp_megatron.preflight.sequence import SequencePlan, plan_sequence

DeviceName = Literal["cpu", "cuda"]

_AUTO_DTYPE: Mapping[str, str] = MappingProxyType({"cpu": "float32", "cuda": "bfloat16"})


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that passed every check.

    Attributes:
        config: the run with what follows from the grid filled in: ``global_batch_size`` is a
            number, ``bf16`` is folded into ``dtype``, ``sequence_parallel`` is off at TP 1 and
            ``eval_iters`` 0 without a validation part.
        grid: the ranks.
        device: None while ``--device auto`` waits for torch; see ``on_device``.
        dtype: the compute type; None as long as it depends on the device.
        kernels: per device that is still possible, the attention kernel and why.
        sequence: how a row is shared; with documents masked, the rows of a micro batch are one.
        vocab_size: tokens the model knows, by default those of the tokenizer.
        padded_vocab_size: rows of the embedding.
        micro_batch_size: rows that go through the model at once.
        num_microbatches: micro batches per step on each rank.
        load: the checkpoint folder (step-N) to go on from.
        load_step: its step, 0 for a new run.
        passed_over: newer checkpoints that are damaged, and what is wrong with them.
        notes: what was decided against or beside the flags, for the start table.
    """

    config: Config
    grid: Grid
    device: DeviceName | None
    dtype: str | None
    kernels: Mapping[DeviceName, KernelChoice]
    sequence: SequencePlan
    vocab_size: int
    padded_vocab_size: int
    micro_batch_size: int
    num_microbatches: int
    load: Path | None
    load_step: int
    passed_over: Mapping[Path, str]
    notes: tuple[str, ...]

    @property
    def kernel(self) -> KernelChoice | None:
        """The attention kernel; None while the device is not known."""
        return None if self.device is None else self.kernels[self.device]

    def on_device(
        self, device: DeviceName, note: str = "", capability: tuple[int, int] | None = None
    ) -> RunPlan:
        """The plan on the device that was found once torch could be asked.

        Args:
            device: the device.
            note: what a person should know about the choice, for the start table.
            capability: of a CUDA device, (major, minor).

        Raises:
            ConfigError: ``--device`` names another one, or the kernel does not run on it.
        """
        asked = self.config.train.device
        if asked not in ("auto", device):
            raise ConfigError("--device", asked, f"there is only {device}", f"--device {device}")
        kernel = kernel_on(self.config, device, capability)
        return dataclasses.replace(
            self,
            device=device,
            dtype=dtype_on(self.config, device),
            kernels={device: kernel},
            notes=(*self.notes, note) if note else self.notes,
        )


def check(
    config: Config,
    launch: Launch,
    *,
    dry_run: bool = False,
    dry_run_world_size: int | None = None,
    given: frozenset[str] = frozenset(),
    auto: bool = False,
    argv: Sequence[str] = (),
    script: str = "launch/pretrain.py",
) -> RunPlan:
    """The plan of the run.

    Args:
        config: the run.
        launch: how this process was started.
        dry_run: nothing is trained: the world may be any, and is by default the smallest.
        dry_run_world_size: the world to plan for instead.
        given: flags the user typed; one of them without an effect is refused.
        auto: the same words are said however often the run is started.
        argv: the user's words, for the corrected command.
        script: the program as the user called it, for the same.

    Raises:
        FinishedError: ``auto``, and the run is over.
        ConfigError: the run is not possible.
    """
    if not dry_run:
        parse_faults(launch.fault, launch.world_size)
    check_values(config)
    config = dataclasses.replace(config, data=rules.with_packing(config.data, given))
    tokenizer = open_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    vocab_size = vocab_size_of(config.model, tokenizer)
    padded = config.model.padded_vocab_size(vocab_size)
    rules.check_model(config.model, config.data.seq_length)
    rules.check_positions(config.model, given)
    check_rope(config.model, config.data.seq_length, given)
    rules.check_window(config.model)
    rules.check_memory(config.memory, config.model.num_layers, given)
    rules.check_tensor_parallel(config.model, config.parallel.tensor_parallel_size, padded)
    # After the model: a command with more ranks is no help where the heads forbid the grid.
    grid, world_note = _grid(config, launch, dry_run, dry_run_world_size, [script, *argv])
    rows, micro_batch_size, num_microbatches = rules.check_batch(config.data, grid.dp)
    sequence = plan_sequence(
        config,
        grid,
        launch,
        rows=micro_batch_size if config.data.document_mask else 1,
        given=given,
        one_node=dry_run and not launch.under_torchrun,
    )
    rules.check_schedule(config.optimizer, config.train, given)
    validates = rules.check_data(config.data, config.train, given)
    kernels = _kernels(config)
    check_data(config.data)
    rules.check_saving(config.checkpoint)
    loaded = find_load(config)
    if loaded is not None:
        check_goes_on(config, loaded.manifest, vocab_size, auto=auto)
    changes = data_changes(config, loaded.manifest) if loaded else ()
    pretrained = check_load_hf(config)
    passed_over = loaded.passed_over if loaded else {}
    check_save(config, loaded.folder if loaded else None, passed_over=passed_over, auto=auto)
    check_log(
        config.log,
        first_step=loaded.manifest.step if loaded else 0,
        last_step=config.train.train_iters,
        world_size=grid.world_size,
        given=given,
    )
    resolved, notes = _resolved(config, grid, rows, validates)
    device = next(iter(kernels)) if len(kernels) == 1 and config.train.device != "auto" else None
    return RunPlan(
        config=resolved,
        grid=grid,
        device=device,
        dtype=_dtype(resolved, device),
        kernels=kernels,
        sequence=sequence,
        vocab_size=vocab_size,
        padded_vocab_size=padded,
        micro_batch_size=micro_batch_size,
        num_microbatches=num_microbatches,
        load=loaded.folder if loaded else None,
        load_step=loaded.manifest.step if loaded else 0,
        passed_over=passed_over,
        notes=(*world_note, *pretrained, *changes, *sequence.notes, *notes),
    )


def dtype_on(config: Config, device: DeviceName) -> str:
    """The compute type on ``device``."""
    dtype = "bfloat16" if config.train.bf16 else config.train.dtype
    return _AUTO_DTYPE[device] if dtype == "auto" else dtype


def kernel_on(
    config: Config, device: DeviceName, capability: tuple[int, int] | None = None
) -> KernelChoice:
    """The attention kernel on ``device``.

    Args:
        config: the run.
        device: the device.
        capability: of a CUDA device, (major, minor); None where it is not known yet.

    Raises:
        ConfigError: there is none that can do what the configuration asks.
    """
    return select_kernel(
        config.parallel.kernel,
        device=device,
        dtype=dtype_on(config, device),
        head_dim=config.model.head_dim,
        attention_dropout=config.model.attention_dropout,
        window=Mask.causal(1, config.model.window_size).has_window,
        deterministic=config.train.deterministic,
        capability=capability,
    )


def _dtype(config: Config, device: DeviceName | None) -> str | None:
    if device is not None:
        return dtype_on(config, device)
    return None if config.train.dtype == "auto" else config.train.dtype


def _kernels(config: Config) -> dict[DeviceName, KernelChoice]:
    """The kernel per device that the flags leave open; refused when none of them works."""
    asked = config.train.device
    devices: tuple[DeviceName, ...] = ("cpu", "cuda") if asked == "auto" else (asked,)
    kernels: dict[DeviceName, KernelChoice] = {}
    refusals: list[ConfigError] = []
    for device in devices:
        try:
            kernels[device] = kernel_on(config, device)
        except ConfigError as error:
            refusals.append(error)
    if not kernels:
        # The device that the kernel does not run on at all says the least.
        raise min(refusals, key=lambda error: "runs on" in error.rule)
    return kernels


def _grid(
    config: Config,
    launch: Launch,
    dry_run: bool,
    dry_run_world_size: int | None,
    command: Sequence[str],
) -> tuple[Grid, tuple[str, ...]]:
    """The grid that the world of this launch, or of the dry run, makes."""
    cp, tp = config.parallel.context_parallel_size, config.parallel.tensor_parallel_size
    inner = cp * tp
    if dry_run_world_size is not None:
        world = dry_run_world_size
        if world < 1:
            raise ConfigError("--world-size", world, "must be positive", str(inner))
        if world % inner:
            rule = f"must be divisible by {_axes(cp, tp)} = {inner}"
            raise ConfigError("--world-size", world, rule, rules.multiples(world, inner))
        return Grid(dp=world // inner, cp=cp, tp=tp), ()
    if dry_run and not launch.under_torchrun:
        note = f"no --world-size given: planned for {inner}, the smallest world"
        return Grid(dp=1, cp=cp, tp=tp), (note,)
    if launch.world_size % inner:
        raise _wrong_world(launch, cp, tp, command)
    return Grid(dp=launch.world_size // inner, cp=cp, tp=tp), ()


def _axes(cp: int, tp: int) -> str:
    sizes = [("--context-parallel-size", cp), ("--tensor-parallel-size", tp)]
    return " x ".join(f"{flag} {size}" for flag, size in sizes if size > 1)


def _wrong_world(launch: Launch, cp: int, tp: int, command: Sequence[str]) -> ConfigError:
    """The error with the whole command that works."""
    inner, world = cp * tp, launch.world_size
    started = "torchrun started" if launch.under_torchrun else "plain python starts"
    rule = f"needs a multiple of {inner} ranks, but {started} {world}"
    flag, _, value = _axes(cp, tp).rpartition(" ")
    if launch.nodes > 1:
        works = f"{rules.multiples(world, inner)} ranks over all nodes"
        return ConfigError(flag, value, rule, works)
    ranks = max(inner, world // inner * inner)
    return ConfigError(
        flag, value, rule, shlex.join(["torchrun", "--nproc-per-node", str(ranks), *command])
    )


def _resolved(
    config: Config, grid: Grid, rows: int, validates: bool
) -> tuple[Config, tuple[str, ...]]:
    """What follows from the grid filled in, and what a person should know of it."""
    notes: list[str] = []
    parallel, train = config.parallel, config.train
    if parallel.sequence_parallel and grid.tp == 1:
        parallel = dataclasses.replace(parallel, sequence_parallel=False)
        notes.append("--sequence-parallel is off: there is one tensor parallel rank")
    if train.eval_iters and not validates:
        train = dataclasses.replace(train, eval_iters=0)
        own = "" if config.data.train_data_path else f"--split {config.data.split} has "
        notes.append(f"{own or 'there is '}no validation part: nothing is validated")
    if train.bf16:
        train = dataclasses.replace(train, bf16=False, dtype="bfloat16")
    data = dataclasses.replace(config.data, global_batch_size=rows)
    return dataclasses.replace(config, parallel=parallel, train=train, data=data), tuple(notes)
