"""The optimizer: studies, probes, surrogate, trials, front, certificate, plots, report, export."""
