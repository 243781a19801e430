"""Which map next: samplers, surrogate, posterior, gain, catalogue, integer programme."""
