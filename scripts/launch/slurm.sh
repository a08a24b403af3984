#!/bin/bash
# Training on Slurm, made by scripts/launch/render.py. Processes find each other by what srun tells them.
# 120 s before the time is up, or when the job is preempted, the run saves itself and ends with exit code 75, and with
# 76 when it hangs or loses a process; then the job goes back to the queue, and goes on from there. The folder has to be
# on storage that all nodes share.
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node={{tasks_per_node}}
#SBATCH --gpus-per-node={{gpus_per_node}}
#SBATCH --cpus-per-task={{cpus_per_task}}
#SBATCH --time={{time}}
#SBATCH --partition={{partition}}
#SBATCH --account={{account}}
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output={{log}}
#SBATCH --open-mode=append

cd {{folder}} || exit 2
sh scripts/bootstrap.sh {{extras}} || exit 2 # at once when it is all there: where nodes have no network, call it before

# Without an end for all at the first that ends: the others are still saving.
srun --kill-on-bad-exit=0 --wait=300 env {{env}} .venv/bin/bigjax {{command}} &
step=$!
trap 'told=yes; kill -TERM "$step"' TERM # srun passes it on to the processes
while :; do
  told=
  wait "$step"
  now=$?
  [ "$now" = 127 ] || code=$now
  [ -n "$told" ] || break # else it was the wait that ended, not the step
done

if { [ "$code" = 75 ] || [ "$code" = 76 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt {{max_restarts}} ]; then
  case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null) in
    RUNNING | "") scontrol requeue "$SLURM_JOB_ID" ;;
    *) echo "stopped by scancel, or requeued by Slurm itself" ;;
  esac
fi
exit "$code"
