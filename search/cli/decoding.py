"""The commands of `ssm-mp` that decode, or look at what decoding depends on: generate, drift."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.base.saying import say
from search.cli.options import Json, Overrides, RunDir, StudyOption, overrides, print_answer, typed

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from search.problem.run_directory import RunDirectory
    from search.problem.spec import StudySpec
    from ssm_mp.config import Config
    from ssm_mp.data import Windows
    from ssm_mp.decoding.decode import Generation
    from ssm_mp.evaluation.drift import Drift
    from ssm_mp.model import LanguageModel

_ROUNDS = 7
"""How often each model is timed, in turn with the others, after a round to warm up."""
_WARM_UP_TOKENS = 2
_WIDENED = 0.7
"""Share of memory that a model may take in float32; a larger one stays in its file's type, and is slower."""

ModelPath = Annotated[Path, typer.Argument(help="Checkpoint, or artifact folder.", metavar="PATH")]


def generate(
    path: ModelPath,
    prompt: Annotated[str, typer.Option(help="Text that is continued.")],
    study: Annotated[
        Path | None, typer.Option("--study", help="Study file that says tokenizer and FP32 checkpoint.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="tokenizer.json, another tokenizer file, or \"bytes\"; default: the artifact's own, else the study's."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the most likely token; above, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also time FP32 and FP16, in turn with this model, on the same tokens.")
    ] = False,
    json_: Json = False,
) -> None:
    """Continue a text with a checkpoint or an artifact, and say how many tokens a second it reads and makes."""
    import torch

    from search.base.errors import StudyError
    from search.problem.spec import load_spec
    from search.problem.workspace import check_device
    from ssm_mp.data import load_tokenizer, prompt_ids
    from ssm_mp.decoding.decode import generate_timed, require_room

    if compare and study is None:
        raise StudyError("--compare needs --study: it says which checkpoint is the FP32 model")
    spec = None if study is None else load_spec(study)
    device = check_device("cpu" if spec is None else spec.search.device)
    model, own_tokenizer = _opened(path, device, None if spec is None else spec.weights_of(path))
    words = load_tokenizer(tokenizer or own_tokenizer or _tokenizer_file(path, spec), model.config.vocabulary, say)
    ids = torch.tensor([prompt_ids(words, typed(prompt, "--prompt"), model.config.vocabulary)], dtype=torch.long)
    if not ids.numel():
        raise StudyError(f"--prompt {prompt!r}: no token in it; give a text to go on from")
    require_room(model, ids.shape[1], tokens)

    def made(by: LanguageModel, count: int) -> Generation:
        return generate_timed(by, ids, count, temperature=temperature, seed=seed)

    made(model, min(tokens, _WARM_UP_TOKENS))
    found = made(model, tokens)
    content = _generated(found, words)
    if compare:
        assert spec is not None
        models = _contenders(path, model, spec, device)
        texts = {name: found if other is model else made(other, tokens) for name, other in models.items()}
        same = {name: _agreeing(texts["fp32"], text) for name, text in texts.items()}
        content["compare"] = _compared(models, found, same)
    print_answer(content, json_, _told)


def drift(
    path: ModelPath,
    study: StudyOption,
    out: Annotated[Path | None, typer.Option(help="Picture to draw: .png, .svg or .pdf.")] = None,
    buckets: Annotated[int, typer.Option(min=1, help="Parts that the positions are divided into.")] = 8,
    run_dir: RunDir = None,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Measure how the perplexity increase over FP32 depends on the position, also in windows 4 times as long.

    Of an artifact it is kept in the study's run directory, where there is one: `ssm-mp report` then shows it.
    """
    from search.base.progress import slow
    from search.problem.spec import load_spec
    from search.problem.splits import load_splits, window_length
    from search.problem.workspace import check_device
    from search.results.plots.drift import plot_drift
    from search.results.plots.files import require_writable, save_picture
    from ssm_mp.data import unigram_perplexity
    from ssm_mp.evaluation.drift import LONG, drift_steps, too_long
    from ssm_mp.evaluation.drift import drift as measure
    from ssm_mp.evaluation.evaluate import require_better_than_guessing

    if out is not None:
        require_writable(out)
    spec = load_spec(study, overrides(set_))
    run = _run_of(spec, run_dir)
    device = check_device(spec.search.device)
    model, _ = _opened(path, device, spec.weights_of(path))
    fp32 = _fp32_of(path, model, spec, device)
    splits = load_splits(spec, fp32.config, say)

    def measured(windows: Windows) -> Drift:
        progress = slow("measuring", drift_steps(fp32, windows))
        found = measure(model, fp32, windows, buckets, progress.step)
        progress.close()
        return found

    found = measured(splits.search)
    if not spec.search.force_baseline:
        unigram = unigram_perplexity(splits.token_counts, splits.search)
        require_better_than_guessing(found.fp32, fp32.config.vocabulary, unigram)
    length = LONG * (fp32.config.max_tokens or window_length(spec, fp32.config))
    refused, long = too_long(fp32.config, length), None
    if refused is None:
        windows = _long_windows(spec, study, overrides(set_), fp32.config, length)
        if isinstance(windows, str):
            refused = windows
        else:
            say(f"measuring {len(windows)} windows of {length} tokens")
            long = measured(windows)
    if out is not None:
        save_picture(plot_drift(str(path), found, long), out)
    if run is not None:
        _keep(run, path, found, long)
    content = {
        "path": str(path),
        **found.to_json(),
        "long": None if long is None else long.to_json(),
        "long_refused": refused,
        "picture": None if out is None else str(out),
    }
    print_answer(content, json_, _drifted)


def _run_of(spec: StudySpec, run_dir: Path | None) -> RunDirectory | None:
    """The study's run directory; None where it has none. Raises StudyError where nothing was run in the one given."""
    from search.problem.run_directory import FINGERPRINT, RunDirectory

    run = RunDirectory.of(spec, run_dir)
    if run_dir is not None:
        run.require()
    return run if (run / FINGERPRINT).exists() else None


def _keep(run: RunDirectory, path: Path, found: Drift, long: Drift | None) -> None:
    """Keep the drift of an artifact for the study's page."""
    from search.run.drift import keep_drift
    from ssm_mp.artifact import is_artifact
    from ssm_mp.artifact_folder import MAP, folder_of
    from ssm_mp.precision_map import read_rules

    if is_artifact(path):
        keep_drift(run, str(path), read_rules(folder_of(path) / MAP), found, long)
        say(f"kept in {run.path}; `ssm-mp report` shows it")


def _opened(path: Path, device: torch.device, weights: str | None = None) -> tuple[LanguageModel, Path | None]:
    """The model of an artifact folder and its tokenizer, else the model of a checkpoint, of `weights` in it."""
    from ssm_mp.artifact import is_artifact, read_artifact
    from ssm_mp.checkpoints import load_checkpoint
    from ssm_mp.components import find_components, fp32_bytes
    from ssm_mp.evaluation.memory import memory_limit
    from ssm_mp.model import build, in_float32

    if is_artifact(path):
        artifact = read_artifact(path, str(device))
        return artifact.model, artifact.tokenizer
    checkpoint = load_checkpoint(path, weights)
    model, limit = build(checkpoint.config, checkpoint.tensors).to(device), memory_limit()
    wide = fp32_bytes(find_components(model))
    fits = device.type != "cpu" or limit is None or wide <= _WIDENED * limit.bytes
    return in_float32(model) if fits else model, None


def _fp32_of(path: Path, model: LanguageModel, spec: StudySpec, device: torch.device) -> LanguageModel:
    """The study's FP32 model. Raises StudyError where `model`, read from `path`, is no version of it."""
    from search.base.errors import StudyError
    from ssm_mp.conversion.regroup import same_model

    fp32, _ = _opened(spec.checkpoint_path, device, spec.checkpoint.weights)
    if not same_model(model.config, fp32.config):
        raise StudyError(
            f"{path} is no version of {spec.checkpoint_path}, the checkpoint of {spec.path}: their sizes differ; give "
            "the study that it was converted in"
        )
    return fp32


def _tokenizer_file(path: Path, spec: StudySpec | None) -> Path:
    """The study's tokenizer, else the one beside the checkpoint, or beside the files of an artifact without its own."""
    from search.base.errors import StudyError
    from search.problem.splits import tokenizer_path
    from ssm_mp.artifact import is_artifact
    from ssm_mp.data import find_tokenizer

    if spec is not None:
        return tokenizer_path(spec)
    beside = find_tokenizer(path if path.is_dir() else path.parent)
    if beside is not None:
        return beside
    lacking = (
        f"{path} holds no tokenizer (it was made from token ids, or by a version before 0.5)"
        if is_artifact(path)
        else f"no tokenizer beside {path}"
    )
    raise StudyError(f"{lacking}: say which with --study or --tokenizer")


def _long_windows(
    spec: StudySpec, study: Path, asked: Sequence[str], config: Config, length: int
) -> Windows | str:  # fmt: skip
    """As much text as the study's search windows, in windows of `length`; or why there are none."""
    from search.problem.spec import load_spec
    from search.problem.splits import load_splits, window_length
    from ssm_mp.errors import DataError

    data, times = spec.data, length // window_length(spec, config)
    counts = {
        "calibration_windows": max(1, data.calibration_count // times),
        "search_windows": max(2, data.search_windows // times),
        "certify_windows": max(2, data.certify_windows // times),
        "window": length,
    }
    longer = load_spec(study, [*asked, *(f"data.{key}={value}" for key, value in counts.items())])
    try:
        return load_splits(longer, config).search
    except DataError as error:
        return str(error)


def _contenders(path: Path, model: LanguageModel, spec: StudySpec, device: torch.device) -> dict[str, LanguageModel]:
    """FP32, all-FP16, and the model itself where it is not the FP32 one."""
    from ssm_mp.artifact import is_artifact
    from ssm_mp.components import find_components
    from ssm_mp.conversion.convert import convert
    from ssm_mp.precision_map import PrecisionMap
    from ssm_mp.scheme import Scheme

    fp32 = _fp32_of(path, model, spec, device)
    half = convert(fp32, PrecisionMap.uniform("fp16", find_components(fp32)), Scheme("none"))
    own = {"artifact": model} if is_artifact(path) else {}
    return {"fp32": fp32, "fp16": half, **own}


def _compared(
    models: Mapping[str, LanguageModel], found: Generation, same: Mapping[str, int]
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Speeds of all models on the same tokens, in turn: medians, and the medians of the ratios to FP32."""
    from ssm_mp.artifact import tensor_bytes
    from ssm_mp.evaluation.benchmark import decode_seconds, prefill_seconds

    prompt, ids = found.prompt, found.ids[:, :-1]  # the last token is made, not read
    steps = ids.shape[1] - prompt
    read = prefill_seconds(list(models.values()), ids[:, :prompt], _ROUNDS)
    made = decode_seconds(list(models.values()), ids, prompt, _ROUNDS) if steps else [[] for _ in models]
    rows: dict[str, dict[str, Any]] = {}
    for (name, model), reading, making in zip(models.items(), read, made, strict=True):
        rows[name] = {
            "bytes": tensor_bytes(model),
            "prefill_tokens_per_second": prompt / statistics.median(reading),
            "prefill_speedup": _ratio(read[0], reading),
            "decode_tokens_per_second": steps / statistics.median(making) if steps else None,
            "decode_speedup": _ratio(made[0], making) if steps else None,
            "same_tokens": same[name],
        }
    return rows


def _ratio(base: Sequence[float], own: Sequence[float]) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(base, own, strict=True))


def _agreeing(found: Generation, other: Generation) -> int:
    """How many new tokens are the same from the first on."""
    same = (found.ids == other.ids)[0, found.prompt :]
    return int(same.long().cumprod(dim=0).sum())


def _generated(found: Generation, words: Tokenizer) -> dict[str, Any]:
    ids = found.ids[0].tolist()
    return {
        "text": words.decode(ids, skip_special_tokens=False),
        "ids": ids,
        "prompt_tokens": found.prompt,
        "new_tokens": len(ids) - found.prompt,
        "prefill_tokens_per_second": found.prefill_tokens_per_second,
        "decode_tokens_per_second": found.decode_tokens_per_second,
    }


def _told(answer: Mapping[str, Any]) -> str:
    """The text, and below it the speeds."""
    lines = [
        answer["text"],
        "",
        f"{answer['prompt_tokens']} tokens read at {_rate(answer['prefill_tokens_per_second'])} a second, "
        f"{answer['new_tokens']} made at {_rate(answer['decode_tokens_per_second'])} a second",
    ]
    if "compare" in answer:
        lines += ["", _speeds(answer["compare"], answer["new_tokens"])]
    return "\n".join(lines)


def _speeds(rows: Mapping[str, Mapping[str, Any]], new_tokens: int) -> str:
    from search.cli.tables import table

    head = ("tokens a second", "bytes", "prefill", "× FP32", "decode", "× FP32", "as FP32")
    cells = [
        (
            name, f"{row['bytes']:,}", _rate(row["prefill_tokens_per_second"]), _times(row["prefill_speedup"]),
            _rate(row["decode_tokens_per_second"]), _times(row["decode_speedup"]), f"{row['same_tokens']}/{new_tokens}",
        )
        for name, row in rows.items()
    ]  # fmt: skip
    return table(head, cells)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _drifted(answer: Mapping[str, Any]) -> str:
    """The increase by position, and whether it grows; then the same in long windows, or why not."""
    parts = [_by_position(answer)]
    if answer["long"] is not None:
        parts.append(_by_position(answer["long"]))
    else:
        parts.append(f"no longer windows: {answer['long_refused']}")
    if answer["picture"] is not None:
        parts.append(f"picture: {answer['picture']}")
    return "\n\n".join(parts)


def _by_position(found: Mapping[str, Any]) -> str:
    from search.cli.tables import table

    rows = [
        (
            f"{row['first']} – {row['last']}", f"{row['fp32_perplexity']:.3f}", f"{row['increase_percent']:+.3f}",
            f"{1.96 * row['stderr_percent']:.3f}",
        )
        for row in found["buckets"]
    ]  # fmt: skip
    whole = (
        "all", f"{found['fp32_perplexity']:.3f}", f"{found['increase_percent']:+.3f}",
        f"{1.96 * found['stderr_percent']:.3f}",
    )  # fmt: skip
    verdict = "it grows" if found["grows"] else "no growth that can be told from noise"
    return "\n".join(
        (
            f"{found['windows']} windows of {found['length']} tokens",
            table(("position", "FP32 perplexity", "increase %", "± 95 %"), [*rows, whole]),
            f"from the first position to the last: {found['growth_percent']:+.3f} ± "
            f"{1.96 * found['growth_stderr_percent']:.3f} %; {verdict}",
        )
    )
