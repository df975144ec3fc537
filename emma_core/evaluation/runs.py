"""A whole evaluation from its configuration: check, draw, score, report; what exists already is not made again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..base.precision import precision_on
from ..base.text_to_image import save_picture
from ..files.loading_words import loading_in_words
from ..files.writing import check_new_folder, make_folder, write_picture, write_text
from ..settings import toml_of
from .coco import coco_captions, coco_references
from .config import EvalConfig, ResultRow, ScoresConfig, check, resolve_evaluation, rows_of
from .generation import Drawer, files_of
from .plan import DrawingJob, Files, comparisons
from .playground_scorers import FEATURES, NOTE, load_playground_scorer, playground_scorer_names
from .references import ReferencePicture, check_prompts, chosen, prompts_in, references_in
from .report import draw_sheet, results, write_results
from .scorers import Scorer, load_scorer, scorer_names
from .scores import Model, ScoreFile, Scoring, missing, score_missing, tables

_PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "timm")


def run(config: EvalConfig, say: Callable[[str], None], bars: bool = True, device: str = "") -> Path:
    """Do what the configuration says, going on in its folder if something is there.

    Args:
        config: resolved.
        say: told what happens, in lines.
        bars: show progress bars.
        device: "" is CUDA if there is any, else the CPU.
    Returns:
        results.md.
    Raises:
        EmmaError: the configuration, the data or a file cannot be used, see the parts.
    """
    check(config)
    check_new_folder(config.output.folder, "output.folder")
    rows = rows_of(config.modules)
    references, prompts, notes = _data(config)
    models = [Model(*one) for one in (scorer_names(config.scores) if config.scores.named else playground_scorer_names())]
    files = files_of(config)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = precision_on(config.sampling.precision, place).name
    compared = list(comparisons(config, files, precision, rows, references, prompts))
    jobs = {one.job.key: one.job for one in compared}
    folder = Path(config.output.folder)
    pictures = make_folder(folder / "pictures")
    write_text(folder / "config.toml", toml_of(config).lstrip())
    for line in (_counts_in_words(references, prompts, rows, jobs), *notes):
        say(line)
    scorers = Scorers(config.scores)
    todo = [job for job in jobs.values() if not (pictures / f"{job.key}.png").is_file()]
    if todo:
        for model in models:  # what is wrong with them should show before hours of drawing
            scorers.of(model)
        say(f"{len(jobs) - len(todo)} of them are there already")
        if line := loading_in_words((config.base.checkpoint, config.base.vae, config.ella.text_encoder, *config.encoder.files)):
            say(line)
        _draw(Drawer(config, place), todo, pictures, config.sampling.batch, bars)
    scores = ScoreFile(folder / "scores.jsonl")
    for model in models:
        unscored = missing(compared, scores, model, references)
        if unscored:
            scoring = Scoring(model, scorers.of(model, place), references)
            with _bar(f"scores of {model.name}", len(unscored), bars) as bar:
                score_missing(unscored, scores, scoring, pictures, config.scores.batch, bar.update)
    found = tables(compared, scores, models, references, (len(references), len(prompts), config.plan.per_pair))
    notes += [] if config.scores.named else [NOTE]
    report = _report(config, files, models, results(found, compared, references), references, prompts, precision, notes)
    say(write_results(folder, report, toml_of(without_folders(config))))
    sheet = draw_sheet(compared, references, rows, pictures, f"{config.plan.protocol}; {rows[-1].name}")
    write_picture(folder / "sheet.png", sheet)
    return folder / "results.md"


class Scorers:
    """The scoring models, each loaded when it is first wanted."""

    def __init__(self, config: ScoresConfig):
        self._config = config
        self._loaded: dict[Model, Scorer] = {}

    def of(self, model: Model, device: torch.device | None = None) -> Scorer:
        """The model, moved to a device.

        Raises:
            EmmaError: see `load_scorer`.
        """
        if model not in self._loaded:
            own = model.kind in FEATURES
            self._loaded[model] = load_playground_scorer(model.kind) if own else load_scorer(model.kind, self._config)
        if device:
            self._loaded[model].to(device)
        return self._loaded[model]


def without_folders(config: EvalConfig) -> EvalConfig:
    """The configuration with files and folders by name alone, as results tell it."""
    tables = {section: {key: _named(value) for key, value in table.items()} for section, table in
              dataclasses.asdict(config).items()}
    return resolve_evaluation(tables)


def _data(config: EvalConfig) -> tuple[list[ReferencePicture], list[str], list[str]]:
    """References, prompts, and what is to be said of them."""
    notes = []
    if config.references.coco:
        references, left_out = coco_references(config.references)
        notes.append(f"References: {Path(config.references.coco).name}; {left_out}.")
    else:
        references = references_in(config.references)
    prompts = coco_captions(config.prompts) if config.prompts.captions else prompts_in(config.prompts)
    check_prompts(prompts, config.plan)
    for what, things, most in (("references", references, config.references.most), ("prompts", prompts, config.prompts.most)):
        if most and len(things) > most:
            notes.append(f"{most} of {len(things)} {what}, chosen at random.")
    return chosen(references, config.references.most), chosen(prompts, config.prompts.most), notes


def _draw(drawer: Drawer, todo: Sequence[DrawingJob], folder: Path, at_once: int, bars: bool) -> None:
    """One reference after another; the pictures of a batch are saved as soon as it is done."""
    text_only_first = sorted(todo, key=lambda job: job.reference is not None)
    with _bar("pictures", len(todo), bars) as bar:
        for _, alike in itertools.groupby(text_only_first, key=lambda job: job.reference):
            of_reference = list(alike)
            for start in range(0, len(of_reference), at_once):
                batch = of_reference[start:start + at_once]
                for job, picture in zip(batch, drawer.draw(batch), strict=True):
                    _save(picture, job, folder)
                bar.update(len(batch))


def _report(
    config: EvalConfig, files: Files, models: Sequence[Model], rows: dict[str, Any], references: Sequence[ReferencePicture],
    prompts: Sequence[str], precision: str, notes: Sequence[str],
) -> dict[str, Any]:
    named = without_folders(config)
    drawn = [{"role": role.split()[0], "name": _file_name(named, role), "sha256": digest}
             for group in (files.base, files.modules, files.encoders) for role, digest in group.items()]
    judging = [{"role": f"scores.{model.kind}" if config.scores.named else model.kind, "name": model.name,
                "sha256": model.sha256} for model in models]
    return {
        "rows": rows, "notes": list(notes), "models": drawn + judging,
        "counts": {"references": len(references), "groups": len({reference.group for reference in references}),
                   "prompts": len(prompts)},
        "precision": precision, "size_px": list(config.size_px), "settings": dataclasses.asdict(named),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _file_name(named: EvalConfig, role: str) -> str:
    """The name of the file in a role such as "ella.file", or "modules.files 2"; the playground's parts have none."""
    key, _, which = role.partition(" ")
    section, _, entry = key.partition(".")
    value = getattr(getattr(named, section), entry)
    if key == "modules.files":
        return f"{which}.safetensors"
    if key == "encoder.files":
        value = value[int(which) - 1] if value else ""
    return value or "of the playground"


def _counts_in_words(references, prompts, rows: Sequence[ResultRow], jobs) -> str:
    groups = {reference.group for reference in references}
    return (f"{len(references)} references in {len(groups)} groups x {len(prompts)} prompts, {len(rows)} rows: {len(jobs)} "
            "pictures")


def _save(picture: Image.Image, job: DrawingJob, folder: Path) -> None:
    """With what it shows in the file's text entries."""
    words = {"row": job.row.name, "prompt": job.prompt, "reference": job.reference.name if job.reference else "",
             "seed": str(job.seed)}
    save_picture(picture, folder / f"{job.key}.png", words)


def _named(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_named(item) for item in value)
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _bar(what: str, total: int, shown: bool):
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="", disable=not shown, dynamic_ncols=True)
