"""The optimizer. Its wings, each importing only those below it:

cli       the command line, `ssm-mp`
run       a search from begin to end
results   what it comes to: certificate, gates, export, report, pictures
sampling  which map next
trials    what is kept of those that were tried
measure   a map's numbers
slurm     batch scripts and the queue
problem   what a study is about
base      what every wing stands on
"""

import os
from importlib.util import find_spec

# numpy's and scipy's products are small here, and their threads would wait for each other longer than they compute;
# read when those libraries are loaded, which is later
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_found = find_spec("ssm_mp")
if _found is None or _found.submodule_search_locations is None:
    raise ImportError(
        f"{'nothing' if _found is None else _found.origin} is found as ssm_mp, which {__path__[0]} needs: rename that "
        "file, or take its folder off PYTHONPATH"
    )
