"""Slurm: batch scripts, submitting them, what the queue says, and a process's own task."""
