"""What a study is about: its file, its run directory, the checkpoint and windows it works on, the maps it allows."""
