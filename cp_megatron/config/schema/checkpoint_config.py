"""Settings of the run's folder and its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from cp_megatron.config.schema.ranges import Size


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where the run is saved, and what it continues from."""

    save: str | None = None
    """The run's folder; by default a new runs/<preset>-<n>, or runs/<folder>-<n> with --load-hf."""
    load: str | None = None
    """The folder of a run to continue, or one of its step-N; its config.yaml supplies all other
    flags. auto: continue the run in --save if it has a checkpoint, otherwise begin it."""
    load_hf: str | None = None
    """A Hugging Face folder with the config.json and safetensors that the run starts from; without
    --preset the learning rate is then 2e-5."""
    save_interval: Size | None = None
    """Steps between two checkpoints; by default there is one at the end or on interruption."""
    async_save: bool = True
    """Copy a checkpoint and write it while training continues."""
    keep_latest_k: Size | None = None
    """Number of newest checkpoints to keep; older ones are removed. By default all are kept."""
    save_retain_interval: Size | None = None
    """With --keep-latest-k: also keep checkpoints whose step is a multiple of this."""
