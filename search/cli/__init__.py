"""The command line, `ssm-mp`: one file a group of commands, what they share, and their answers as text."""
