"""A map's number: objective, stacking, racing, probes, gradients, predicted latency."""
