"""Model + map + statistics → a new model."""
