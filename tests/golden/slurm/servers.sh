#!/bin/bash
# try, rendered by bigtrain from config.yaml.
# code: bigtrain 1
#SBATCH --job-name=try
#SBATCH --comment=bigtrain:/home/me/runs/try
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=60
#SBATCH --partition=gpu
#SBATCH --no-kill
#SBATCH --output=runs/try/slurm/%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@75
#SBATCH --requeue
#SBATCH --chdir=/home/me
#SBATCH hetjob
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=100G
#SBATCH --partition=cpu
#SBATCH --constraint=fast
#SBATCH --no-kill
#SBATCH --exclusive

command -v bigtrain > /dev/null || {
  echo "bigtrain is not in PATH on $(hostname): activate its environment by a line in launch.slurm.setup" >&2
  exit 2
}
[ -f runs/try/slurm/config.yaml ] || {
  echo "there is no runs/try/slurm/config.yaml in $PWD: submit this with bigtrain launch --slurm, or from the folder of the run" >&2
  exit 2
}
exec bigtrain launch runs/try/slurm/config.yaml --resume
