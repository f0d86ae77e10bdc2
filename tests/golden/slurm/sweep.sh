#!/bin/bash
# try, rendered by bigtrain from config.yaml.
# code: bigtrain 1
#SBATCH --job-name=try
#SBATCH --comment=bigtrain:/home/me/runs/try
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --array=0-7%2
#SBATCH --output=runs/try/slurm/%A_%a.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@75
#SBATCH --requeue
#SBATCH --chdir=/home/me

command -v bigtrain > /dev/null || {
  echo "bigtrain is not in PATH on $(hostname): activate its environment by a line in launch.slurm.setup" >&2
  exit 2
}
[ -f runs/try/slurm/config.yaml ] || {
  echo "there is no runs/try/slurm/config.yaml in $PWD: submit this with bigtrain launch --slurm, or from the folder of the run" >&2
  exit 2
}
case "${SLURM_ARRAY_TASK_ID:-}" in
  0) task=(optimizer.lr=0.001 run.seed=0 'data.cache_dir=it'"'"'s' run.dir=runs/try/0) ;;
  1) task=(optimizer.lr=0.001 run.seed=0 data.cache_dir=null run.dir=runs/try/1) ;;
  2) task=(optimizer.lr=0.001 run.seed=1 'data.cache_dir=it'"'"'s' run.dir=runs/try/2) ;;
  3) task=(optimizer.lr=0.001 run.seed=1 data.cache_dir=null run.dir=runs/try/3) ;;
  4) task=(optimizer.lr=0.0003 run.seed=0 'data.cache_dir=it'"'"'s' run.dir=runs/try/4) ;;
  5) task=(optimizer.lr=0.0003 run.seed=0 data.cache_dir=null run.dir=runs/try/5) ;;
  6) task=(optimizer.lr=0.0003 run.seed=1 'data.cache_dir=it'"'"'s' run.dir=runs/try/6) ;;
  7) task=(optimizer.lr=0.0003 run.seed=1 data.cache_dir=null run.dir=runs/try/7) ;;
  *) echo "no job of this sweep: ${SLURM_ARRAY_TASK_ID:-none}" >&2; exit 2 ;;
esac
exec bigtrain launch runs/try/slurm/config.yaml --resume "${task[@]}"
