#!/bin/bash
# llama_7b, rendered by bigtrain from configs/llama_7b_hsdp_64gpu.yaml.
#SBATCH --job-name=llama_7b
#SBATCH --comment=bigtrain:runs/llama_7b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --exclusive
#SBATCH --output=runs/llama_7b/slurm/%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

trap 'echo "launch.slurm.setup failed: $BASH_COMMAND" >&2; exit 2' ERR
module load cuda
source .venv/bin/activate
trap - ERR
command -v bigtrain > /dev/null || {
  echo "bigtrain is not in PATH on $(hostname): activate its environment by a line in launch.slurm.setup" >&2
  exit 2
}
[ -f runs/llama_7b/slurm/config.yaml ] || {
  echo "there is no runs/llama_7b/slurm/config.yaml in $PWD: submit this with bigtrain launch --slurm, or from the folder of the run" >&2
  exit 2
}
exec bigtrain launch runs/llama_7b/slurm/config.yaml --resume
