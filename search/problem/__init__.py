"""What a study is about: the study file, its run directory, its workspace and its space of maps."""
