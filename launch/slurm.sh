#!/bin/bash
# Trains over the nodes of a SLURM job, one torchrun per node. From the root of the repository, in
# the environment that the program is installed in:
#
#     sbatch --nodes 4 --time 12:00:00 launch/slurm.sh --preset llama-1b --context-parallel-size 8
#
# Before its time is over the run is saved, and the job goes back into the queue and goes on:
#
#     SLURM --USR1--> this script --scancel TERM--> torchrun --TERM--> ranks: finish the step, save
#     srun ends -> scontrol requeue -> this script again: --load auto finds what was saved
#
# USR1 goes to this script alone (B:). Should another sender's reach torchrun (scancel --signal=USR1
# JOB, say), it is passed on, and the ranks save just so. The script does not pass a
# signal to srun, which would answer TERM with SIGKILL to its tasks, but has SLURM send TERM to them.
#
# Read from the environment, all optional:
#     RUN              the run's folder, seen by all nodes; by default runs/<job's name>-<job's id>.
#                      A folder with checkpoints is gone on with, flags override its settings.
#     RANKS_PER_NODE   by default the node's GPUs, 1 where it has none
#     SCRIPT           by default launch/pretrain.py

#SBATCH --job-name=cp_megatron
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

restart=${SLURM_RESTART_COUNT:-0}
run=${RUN:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + (SLURM_JOB_ID + restart) % 20000))

# The ranks have this long to save, less than SLURM gives; torchrun's own default is 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# srun does not take it over by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

warned= interrupted=
warn() {
    warned=yes interrupted=yes
    echo "slurm.sh: the time is nearly over: the run is saved and put back into the queue"
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap warn USR1

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --kill-on-bad-exit=1 \
    torchrun --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    --rdzv-id "$SLURM_JOB_ID-$restart" --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:$port" \
    "${SCRIPT:-launch/pretrain.py}" --save "$run" --load auto "$@" &
step=$!

# A trap ends the waiting, not the training.
while :; do
    interrupted= code=0
    wait "$step" || code=$?
    [ -n "$interrupted" ] || break
done

# torchrun calls a stopped run failed (1), also when it was saved; 0 is a run that is complete.
if [ -n "$warned" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
