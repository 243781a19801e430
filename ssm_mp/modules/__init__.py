"""What one component computes, whatever its precision."""
