#!/bin/bash
# gpt_124m_servers, rendered by bigtrain from configs/gpt_124m_servers.yaml.
#SBATCH --job-name=gpt_124m_servers
#SBATCH --comment=bigtrain:runs/gpt_124m_servers
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --no-kill
#SBATCH --exclusive
#SBATCH --output=runs/gpt_124m_servers/slurm/%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH hetjob
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --partition=cpu
#SBATCH --no-kill

command -v bigtrain > /dev/null || {
  echo "bigtrain is not in PATH on $(hostname): activate its environment by a line in launch.slurm.setup" >&2
  exit 2
}
[ -f runs/gpt_124m_servers/slurm/config.yaml ] || {
  echo "there is no runs/gpt_124m_servers/slurm/config.yaml in $PWD: submit this with bigtrain launch --slurm, or from the folder of the run" >&2
  exit 2
}
exec bigtrain launch runs/gpt_124m_servers/slurm/config.yaml --resume
