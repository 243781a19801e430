"""Folders for MLX, by mlx-lm: matrices of integers in groups along the row, everything else float."""
