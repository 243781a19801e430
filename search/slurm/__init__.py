"""Slurm: batch scripts, sbatch's options, the queue."""
