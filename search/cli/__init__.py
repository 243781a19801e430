"""The command line, `ssm-mp`: one file a group of commands."""
