#!/bin/bash
# my 50% "try", rendered by bigtrain from config.yaml.
# code: bigtrain 1
#SBATCH --job-name="the big one"
#SBATCH --comment="bigtrain:/home/me/runs/my 50% \"try\""
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --mem=200G
#SBATCH --time=1-12:00:00
#SBATCH --account="proj#1"
#SBATCH --partition=gpu,big
#SBATCH --qos=high
#SBATCH --constraint=a100|h100
#SBATCH --exclude=n[3-4]
#SBATCH --reservation=course
#SBATCH --dependency=afterok:12
#SBATCH --exclusive
#SBATCH --output="runs/my 50%% \"try\"/slurm/%j.out"
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --no-requeue
#SBATCH --chdir=/home/me
#SBATCH --mail-type=END
#SBATCH --nice=5

trap 'echo "launch.slurm.setup failed: $BASH_COMMAND" >&2; exit 2' ERR
module load cuda/12
source ~/venv/bin/activate
trap - ERR
command -v bigtrain > /dev/null || {
  echo "bigtrain is not in PATH on $(hostname): activate its environment by a line in launch.slurm.setup" >&2
  exit 2
}
[ -f runs/try/slurm/config.yaml ] || {
  echo "there is no runs/try/slurm/config.yaml in $PWD: submit this with bigtrain launch --slurm, or from the folder of the run" >&2
  exit 2
}
exec bigtrain launch runs/try/slurm/config.yaml --resume
