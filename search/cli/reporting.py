"""The command `report`: the page of a search, written again, opened or served."""

from __future__ import annotations

from typing import Annotated

import typer

from search.base.saying import say
from search.cli.options import Json, Overrides, RunDir, StudyPath, Target, opened_trials, print_answer


def report(
    study: StudyPath,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on 127.0.0.1, where it follows a search that runs.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 takes any that is free.")] = 8765,
    run_dir: RunDir = None,
    set_: Overrides = None,
    target: Target = None,
    json_: Json = False,
) -> None:
    """Write a search's page (report.html) again from what its run directory holds; open or serve it."""
    from search.cli.answers import listed
    from search.run.page import write_page
    from search.run.stored import content_now

    spec, run, opened = opened_trials(study, run_dir, set_, target)
    if serve:
        from search.run.serving import serve_page

        serve_page(
            lambda: opened.patiently(lambda: content_now(spec, run, opened.study)), port, say, _open if open_ else None
        )
        return
    path = write_page(run, opened.patiently(lambda: content_now(spec, run, opened.study)))
    print_answer({"page": str(path)}, json_, listed)
    if open_:
        _open(path.absolute().as_uri())


def _open(address: str) -> None:
    """Open an address in the user's browser, or say that there is none."""
    import webbrowser

    if not webbrowser.open_new_tab(address):
        say(f"note: no browser was found here; open {address} in yours")
