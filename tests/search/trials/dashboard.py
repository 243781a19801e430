"""optuna-dashboard on a study's storage, asked as its own page asks it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any
from wsgiref.util import setup_testing_defaults

from optuna.trial import TrialState
from optuna_dashboard import wsgi

from search.trials.attributes import FINISHED
from search.trials.maps import map_of
from tests.search.run.claiming import Bench, seeds

TRIALS = 6


def require_shown(bench: Bench, address: str) -> None:
    """Work on a study; the dashboard at that address of its storage then shows every trial, and harms none."""
    bench.work(TRIALS, seeds(TRIALS))
    before = bench.require_whole(TRIALS)
    app = wsgi(address)
    (summary,) = _asked(app, "/api/studies")["study_summaries"]
    shown = _asked(app, f"/api/studies/{summary['study_id']}")
    assert shown["directions"] == ["maximize", "minimize"]
    finished = [trial for trial in shown["trials"] if TrialState[trial["state"].upper()] in FINISHED]
    of_study = [t for t in bench.opened().study.get_trials(deepcopy=False) if t.state in FINISHED]
    assert [_params(trial) for trial in finished] == [map_of(trial) for trial in of_study]
    assert [trial.get("values") for trial in finished if trial["state"] == "Complete"] == [
        trial.values for trial in of_study if trial.state == TrialState.COMPLETE
    ]
    bench.work(TRIALS + 1)  # the search goes on beside it
    assert bench.require_whole(TRIALS + 1)[:TRIALS] == before
    assert len(_asked(wsgi(address), f"/api/studies/{summary['study_id']}")["trials"]) >= TRIALS + 1


def _params(trial: Mapping[str, Any]) -> dict[str, str]:
    return {param["name"]: param["param_external_value"] for param in trial["params"]}


def _asked(app: Any, path: str) -> dict[str, Any]:
    """The answer to a GET, which must be a good one."""
    environment: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": "GET", "wsgi.errors": io.StringIO()}
    setup_testing_defaults(environment)
    statuses: list[str] = []
    body = b"".join(app(environment, lambda status, headers, *_: statuses.append(status)))
    assert statuses[0].startswith("200"), (statuses, body[:500], environment["wsgi.errors"].getvalue())
    found: dict[str, Any] = json.loads(body)
    return found
