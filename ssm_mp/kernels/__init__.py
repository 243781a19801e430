"""Kernels in C for the CPU, compiled with the user's own compiler; without one, torch computes everything."""
