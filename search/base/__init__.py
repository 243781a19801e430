"""What every wing stands on: errors, paths, locks, stopping, progress, output, the Pareto front, confidence bounds."""
