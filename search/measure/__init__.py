"""A map's numbers: probes and gradients before the trials, likelihoods in a race, latencies from a table."""
