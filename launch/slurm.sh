#!/bin/bash
# Trains on the nodes of a SLURM job, with one torchrun per node. Run it from the root of the
# repository, in the environment that the program is installed in:
#
#     sbatch --nodes 4 --time 12:00:00 launch/slurm.sh --preset llama-1b --context-parallel-size 8
#
# Before the time limit, the run is saved and the job is requeued; the next start resumes:
#
#     SLURM --USR1--> this script --scancel TERM--> torchrun --TERM--> ranks: finish the step, save
#     srun ends -> scontrol requeue -> this script again: --load auto finds what was saved
#
# SLURM sends USR1 to this script only (B:). If another USR1 reaches torchrun (from scancel
# --signal=USR1 JOB, for example), torchrun forwards it and the ranks save too. The script does not
# send a signal to srun, which would answer TERM by killing its tasks; SLURM signals the tasks.
#
# Environment variables, all optional:
#     RUN              the run's folder, visible to all nodes; by default
#                      runs/<name of the job>-<id of the job>. If it has checkpoints, the run
#                      resumes, and flags override its settings.
#     RANKS_PER_NODE   by default the number of the node's GPUs, or 1 without GPUs
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

# The ranks have this long to save, less than SLURM allows. torchrun's default is 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# srun does not inherit this setting by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

warned= interrupted=
warn() {
    warned=yes interrupted=yes
    echo "slurm.sh: the time limit is near: saving the run and requeueing the job"
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

# A trap interrupts wait, but not the training.
while :; do
    interrupted= code=0
    wait "$step" || code=$?
    [ -n "$interrupted" ] || break
done

# torchrun exits with 0 if the run is complete, and with 1 if it was stopped, even if it was saved.
if [ -n "$warned" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
