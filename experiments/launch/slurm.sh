#!/usr/bin/env bash
# One process a GPU, on Slurm:  sbatch experiments/launch/slurm.sh RECIPE.yaml [--flag value ...]
# Name a run_dir on a filesystem that all nodes share. The exit codes are those of docs/how_to/resume.md.
#SBATCH --job-name=lfm-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SIGTERM to every process five minutes before the time is up: they save a checkpoint and stop.
#SBATCH --signal=TERM@300
set -uo pipefail

LFM=${LFM:-.venv/bin/lfm}
MAX_RESTARTS=${MAX_RESTARTS:-20}

# When one process is lost, Slurm ends the others at once.
srun --kill-on-bad-exit=1 "$LFM" train "$@" --distributed auto
status=$?

case $status in
  0) echo "the run has reached its end" ;;
  1 | 2) echo "the run cannot go on by itself (exit code $status); see the message above" ;;
  *) # 130: stopped on request; 75, or a signal: a process was lost. The same command resumes.
    if (( ${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS )); then
      echo "exit code $status: requeued, to resume from the latest checkpoint"
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "exit code $status after $MAX_RESTARTS restarts: not requeued"
    fi ;;
esac
exit "$status"
