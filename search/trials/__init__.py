"""What is kept of trials: where (SQLite, journal, PostgreSQL), by whom, which maps, with what results."""
