"""`python -m search.cli`, which is `ssm-mp`."""

from search.cli.main import main

if __name__ == "__main__":
    main()
