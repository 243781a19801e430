"""Which map next: one file a sampler, and what `front` thinks with (surrogate, posterior, expected gain, programme)."""
