"""`python -m ssm_mp`, which is `ssm-mp`."""

from ssm_mp.start import main

if __name__ == "__main__":
    main()
