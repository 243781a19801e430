"""What a long text costs until its windows are drawn: seconds and peak memory of a fresh process.

    python -m benchmarks.long_text [--megabytes 45] [--tokenizer FILE] [--json]      # half a minute

The text is made of the standard library's files, again and again with other numbers and names in them. The same is
done a second time, as a second worker or a continuation does it: with the ids that the first has kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ssm_mp.data.corpus import stdlib_documents

TOKENIZER = Path("studies/reference/tokenizer.json")
WINDOWS, LENGTH, VOCABULARY = (32, 32, 48), 256, 8000


def write_text(path: Path, megabytes: int) -> int:
    """A text of that size; its bytes."""
    documents, written, turn = stdlib_documents("train"), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            document = documents[turn % len(documents)]
            turn += 1
            again = turn // len(documents)
            if again:  # another text, not a repeated one
                document = document.replace("self", f"self{again}").replace("0", str(again)).replace("the ", "a ")
            written += file.write(document + "\n")
    return path.stat().st_size


def draw_windows(text: Path, tokenizer: Path, cache: Path) -> None:
    """Read, encode, draw; print the seconds and the peak in MiB of this process."""
    began = time.perf_counter()
    from ssm_mp.data import cut, draw, load_tokenizer, read_tokens

    ids = read_tokens(text, load_tokenizer(tokenizer, VOCABULARY), VOCABULARY, cache=cache)
    drawn = draw(cut(ids, LENGTH), WINDOWS, 0)
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": used.ru_utime + used.ru_stime}
    content = {**spent, "peak_mib": used.ru_maxrss / 1024, "tokens": int(ids.size)}
    print(json.dumps({**content, "digests": [windows.digest[:16] for windows in drawn]}))


def main() -> None:
    """Measure, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=45)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("TEXT", "CACHE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.draw:
        draw_windows(asked.draw[0], asked.tokenizer, asked.draw[1])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_text(folder / "text.txt", asked.megabytes)
        command = [sys.executable, "-m", "benchmarks.long_text", "--tokenizer", str(asked.tokenizer), "--draw"]
        runs = [
            json.loads(subprocess.check_output([*command, str(folder / "text.txt"), str(folder)])) for _ in range(2)
        ]
    if asked.json:
        print(json.dumps({"bytes": size, "first": runs[0], "again": runs[1]}))
        return
    for what, found in zip(("first", "again"), runs, strict=True):
        print(
            f"{what}: {size:,} bytes, {found['tokens']:,} tokens: {found['seconds']:.1f} s "
            f"({found['cpu_seconds']:.1f} s of cores), peak "
            f"{found['peak_mib']:,.0f} MiB"
        )


if __name__ == "__main__":
    main()
