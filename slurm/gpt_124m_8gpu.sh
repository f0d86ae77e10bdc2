#!/bin/bash
# gpt_124m, rendered by bigtrain from configs/gpt_124m_8gpu.yaml.
#SBATCH --job-name=gpt_124m
#SBATCH --comment=bigtrain:runs/gpt_124m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --exclusive
#SBATCH --output=runs/gpt_124m/slurm/%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

command -v bigtrain > /dev/null || {
  echo "bigtrain is not in PATH on $(hostname): activate its environment by a line in launch.slurm.setup" >&2
  exit 2
}
[ -f runs/gpt_124m/slurm/config.yaml ] || {
  echo "there is no runs/gpt_124m/slurm/config.yaml in $PWD: submit this with bigtrain launch --slurm, or from the folder of the run" >&2
  exit 2
}
exec bigtrain launch runs/gpt_124m/slurm/config.yaml --resume
