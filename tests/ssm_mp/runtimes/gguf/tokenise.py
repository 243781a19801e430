"""Let llama.cpp cut texts into tokens, in a process of its own: `python tokenise.py FILE.gguf texts.json` → ids."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_void_p
from pathlib import Path

RUNNER = Path(__file__).parents[4] / "ssm_mp/runtimes/gguf/run.py"


def main() -> None:
    spec = importlib.util.spec_from_file_location("run", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    sys.modules["run"] = run
    spec.loader.exec_module(run)
    library = run.Library()
    cut = library.c.llama_tokenize
    cut.restype = c_int32
    cut.argtypes = (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)
    vocabulary = library.c.llama_model_get_vocab(library.model(Path(sys.argv[1])))
    found = []
    for text in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
        raw = text.encode()
        room = (c_int32 * (len(raw) + 8))()
        count = cut(vocabulary, raw, len(raw), room, len(room), True, True)
        found.append(list(room[:count]))
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
