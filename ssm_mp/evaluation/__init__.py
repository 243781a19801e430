"""Windows → likelihoods, divergences, drift, latency; many candidates at once."""
