#!/bin/bash
# A run on several hosts under Slurm, with one launcher a host and one process a GPU. From the repository's folder:
#     sbatch configs/launch/slurm.sh --config configs/mine.yaml
# Five minutes before the time is up this script gets SIGUSR1 and passes it on: the run saves, and the job is queued
# again, to resume. Slurm itself queues a job again whose host failed. output_dir and data have to be on a shared disk.
#
# A run of one process needs less: with --signal=USR1@300 and without B:, which has Slurm signal the process itself,
#     srun python train.py --config configs/mine.yaml || { [ $? = 143 ] && scontrol requeue "$SLURM_JOB_ID"; }
#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

export LAUNCH_CONFIG=${LAUNCH_CONFIG:-configs/accelerate/several-machines.yaml}
# The launcher passes on what it gets, SIGUSR1 only if asked to, and kills what has not saved after so many seconds.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
export NUM_PROCESSES=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
MAIN_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_HOST
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a host have ports of their own

time_is_up=false
stop() {
    time_is_up=true
    scancel --signal=USR1 "$SLURM_JOB_ID" # to the job's steps, all processes of them, and not to this script
}
trap stop USR1

# shellcheck disable=SC2016 # expanded on each host
srun bash -c 'exec accelerate launch --quiet --config_file "$LAUNCH_CONFIG" --num_machines "$SLURM_NNODES" \
    --machine_rank "$SLURM_NODEID" --num_processes "$NUM_PROCESSES" --main_process_ip "$MAIN_HOST" \
    --main_process_port "$MAIN_PORT" train.py "$@"' launch "$@" &
step=$!
wait "$step"
code=$?
if $time_is_up; then # the signal ended the wait, and not the step
    wait "$step" && exit 0 # it was about to finish
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
