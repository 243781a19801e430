"""What is kept: storages, journal, who owns a trial, what a trial carries."""
