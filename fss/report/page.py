"""The report: pictures, tables and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image

import fss
import svf_fast
from fss.files import atomic_write
from fss.models import FewShotModel, rebuild_model
from fss.report.classes import draw_classes
from fss.report.components import draw_components, example_photo
from fss.report.cost import MIB, draw_counted, draw_measured, readable, step_memory
from fss.report.curves import draw_curves
from fss.report.plot import CONTROL, Plot
from fss.report.results import (
    differences,
    facts,
    mean_rows,
    percent,
    result_row,
    setting_in_words,
)
from fss.report.runs import ReportedRun, read_runs
from fss.report.spectrum import (
    Spectrum,
    change_rows,
    default_layers,
    draw_all,
    draw_largest,
    read_spectra,
)

_EPISODES_WIDTH = 1200  # pixels


def write_report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    photo: str | Path | None = None,
    layers: Sequence[str] = (),
) -> Path:
    """Write a page about runs, and its pictures as PNG and SVG.

    What is missing is omitted, and the page says so: the test of a run in progress, the singular
    values of a run that does not train S, heat maps where neither its photos nor `photo` exist.

    Args:
        runs: folders that `fss train` wrote.
        out: folder for report.html and pictures/; by default report/ in the first run's folder.
        photo: picture for the heat maps; by default the first one of the test.
        layers: convolutions for the heat maps, as the backbone names them (layer3.5.conv2); by
            default the last 3×3 and the last 1×1 of layer 3.

    Returns the path of the page.

    Raises:
        FileNotFoundError: a missing run, or a missing file that every run has.
        ValueError: a damaged file, named; a layer that no run trains.
    """
    read = read_runs(runs)
    folder = Path(out) if out is not None else read[0].folder.path / "report"
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    learned = _learned(read, pictures, None if photo is None else str(photo), layers)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fss.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": readable, "percent": percent}
    page = environment.get_template("page.html").render(
        title=_title(read),
        facts=facts(read),
        rows=[result_row(run, number) for number, run in enumerate(read)],
        means=mean_rows(read),
        differences=differences(read),
        curves=draw_curves(read, pictures),
        classes=draw_classes(read, pictures),
        episodes=[_episodes(run, number, pictures) for number, run in enumerate(read, 1)],
        measured=draw_measured(read, pictures),
        runs=[_details(run) for run in read],
        version=fss.__version__,
        pictures=pictures.name,
        mib=MIB,
        **learned,
    )
    with atomic_write(path) as file:
        file.write(CONTROL.sub("\ufffd", page).encode())
    return path


def _learned(
    runs: Sequence[ReportedRun], folder: Path, photo: str | None, layers: Sequence[str]
) -> dict[str, Any]:
    """Collect what the page shows of the singular values, and why it shows none of some runs."""
    spectra: dict[int, list[Spectrum]] = {}
    heat: list[tuple[int, Plot]] = []
    reports: dict[str, Any] = {}
    networks: dict[str, FewShotModel] = {}
    others = [run.name for run in runs if not run.trains_singular_values]
    notes = [f"{', '.join(others)}: no regime that trains S alone, nothing to show."] * any(others)
    for number, run in enumerate(runs):
        if not run.trains_singular_values:
            continue
        checkpoint = run.checkpoint()
        if checkpoint is None:
            notes.append(f"{run.name}: in progress, no checkpoint yet.")
            continue
        state = checkpoint["model"]
        setting = setting_in_words(run)
        if setting in networks:
            networks[setting].load_state_dict(state)
        else:
            networks[setting] = rebuild_model(run.config, state)
            if any(True for _ in svf_fast.svf_parameters(networks[setting])):
                reports[setting] = step_memory(run, networks[setting])
        network = networks[setting]
        try:
            own = read_spectra(run, state)
        except FileNotFoundError as error:
            notes.append(f"{run.name}: {error}.")
            continue
        spectra[number] = own
        try:
            example = example_photo(run, photo)
        except (OSError, ValueError) as error:
            if photo is not None:
                raise
            notes.append(f"{run.name}: no heat maps, {error}; name a picture with --photo.")
            continue
        chosen = list(layers) or default_layers(own)
        name = f"components-{number + 1}"
        heat.append((number, draw_components(run, network, own, example, chosen, folder, name)))
    if layers and not spectra:
        raise ValueError(f"--layers: no run here has trained singular values, got {layers[0]}")
    names = [run.name for run in runs]
    return {
        "largest": draw_largest(spectra, names, folder) if spectra else None,
        "all_values": draw_all(spectra, names, folder) if spectra else None,
        "changes": {names[number]: change_rows(own) for number, own in spectra.items()},
        "heat": heat,
        "notes": notes,
        "reports": reports,
        "counted": draw_counted(reports, folder) if reports else None,
    }


def _title(runs: Sequence[ReportedRun]) -> str:
    names = [run.name for run in runs]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"fss report: {shown}"


def _episodes(run: ReportedRun, number: int, folder: Path) -> dict[str, Any]:
    """Return name, data URI and size of the picture of test episodes; without one, the reason.

    It is WebP, with a tenth of the bytes of the PNG, which is written to `folder`.
    """
    content = run.episodes()
    if content is None:
        why = "the run is in progress" if run.result is None else "the run drew none"
        return {"name": run.name, "uri": "", "why": why}
    with atomic_write(folder / f"episodes-{number}.png") as file:
        file.write(content)
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    if picture.width > _EPISODES_WIDTH:
        height = round(picture.height * _EPISODES_WIDTH / picture.width)
        picture = picture.resize((_EPISODES_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"name": run.name, "uri": uri, "why": "", "size": picture.size}


def _details(run: ReportedRun) -> dict[str, str]:
    result = run.result or {}
    return {
        "name": run.name,
        "command": result.get("command", ""),
        "settings": yaml.safe_dump(run.config.to_dict(), sort_keys=False, allow_unicode=True),
    }
