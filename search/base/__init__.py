"""What every room uses: errors, front and hypervolume, confidence bounds, locks, stop, progress, paths, streams."""
