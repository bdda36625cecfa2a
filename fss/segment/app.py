"""A local web page to segment pictures by painting the object in another: `fss app`."""

from __future__ import annotations

import functools
import ipaddress
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageColor

import svf_fast
from fss.colors import ORANGE
from fss.data import ShapesSource
from fss.runs.folder import RunFolder
from fss.segment.pictures import find_object, overlay, read_picture
from fss.segment.segmenter import Device, FewShotSegmenter

MAX_BYTES = 20 * 2**20
"""Of an uploaded file."""

MAX_PIXELS = 25_000_000
"""Of an uploaded picture."""

MAX_PICTURES = 16
"""Supports, and queries of one click."""

Support = tuple[NDArray[np.uint8], NDArray[np.uint8]]

# The page, its pictures and its socket come from this program; a browser asks nobody else.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' "
    "blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; frame-ancestors 'none'"
)

_HELP = """\
1. **Support**: drop in a picture and paint the object, or upload its mask. *Add* it to give more.
2. **Queries**: drop in the pictures to look for the object in.
3. **Segment**. If the result is poor, **Tune** on supports and queries: the results follow.
"""


def serve(
    run: str | None = None,
    adapters: tuple[str, ...] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = False,
    backbone: str | None = None,
    weights: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    device: Device = "auto",
) -> None:
    """Serve a page to paint an object in a picture and to find it in others, until ctrl-C.

    Pictures stay on this machine. Uploads of more than 20 MiB or 25 million pixels are refused,
    and copies of them deleted after an hour.

    Args:
        run: of fss train; without one, training-free matching.
        adapters: files of singular values to switch between; those that a run left are found.
        host: address to listen at; by default only this machine can reach the page. Another one
            opens it to the network, without a password.
        port: by default the first that is free from 7860 on.
        browser: open the page in the browser.
        backbone: of matching, its name.
        weights: of matching, a file.
        checkpoint: of the run, "best" or "last".
        device: "auto" (a GPU if there is one), "cpu" or "cuda".

    Raises:
        ImportError: gradio is not installed.
        FileNotFoundError, ValueError: see `FewShotSegmenter`.
        OSError: a port that is taken.
    """
    _import_gradio()  # before anything that takes longer
    if run is None:
        segmenter = FewShotSegmenter(backbone, weights, device=device)
    else:
        if backbone is not None or weights is not None:
            raise ValueError("backbone, weights: a run brings its own, omit them")
        segmenter = FewShotSegmenter.load(run, checkpoint, device=device)
    choices = find_adapters(run, adapters)
    for adapter in choices.values():
        segmenter.adapter(adapter)  # what does not fit is an error now, not at a click
    segmenter.adapter(None)
    page = build_page(segmenter, choices, _title(run, weights or backbone))
    address = launch(page, host, port, browser)
    if not _is_loopback(host):
        print(f"fss app: everyone who can reach {host} can use the page, there is no password")
    print(f"fss app: {address} (ctrl-C stops it)", flush=True)
    page.block_thread()


def launch(
    page: Any, host: str = "127.0.0.1", port: int | None = None, browser: bool = False
) -> str:
    """Serve a page of `build_page` in the background; return its address. `page.close()` ends it.

    From then on Pillow refuses pictures of more than 25 million pixels in this process: Gradio
    decodes uploads before anyone else sees them.
    """
    gradio = _import_gradio()
    from starlette.middleware import Middleware

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # it refuses twice this number
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        quiet=True,
        share=False,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        max_file_size=MAX_BYTES,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(_OnlyFromHere)]},
        theme=gradio.themes.Default(
            primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
    )
    return address


def build_page(segmenter: FewShotSegmenter, choices: dict[str, str | None], title: str) -> Any:
    """Build the page, a `gradio.Blocks`.

    Args:
        segmenter: does the work, one click at a time.
        choices: adapters by the names they have on the page, see `FewShotSegmenter.adapter`; the
            first is chosen at first, and none is offered if there is only one.
        title: what segments.
    """
    gradio = _import_gradio()
    lock = threading.Lock()
    folder = tempfile.TemporaryDirectory(prefix="fss-app-")  # of files to download

    def segment(
        supports: list[Support],
        editor: Any,
        mask: str | None,
        value: str,
        queries: Any,
        choice: str,
        limit: float,
        tuned: dict[str, svf_fast.Adapter],
    ) -> list[tuple[Image.Image, str]]:
        if not supports:
            supports = [_support(editor, mask, value, gradio)]
        pictures = _queries(queries)
        if not pictures:
            raise ValueError("Queries: drop in at least one picture.")
        with lock:
            segmenter.adapter(tuned[choice] if choice in tuned else choices[choice])
            segmenter.threshold = limit
            segmenter.support([image for image, _ in supports], [found for _, found in supports])
            results = segmenter(pictures)
        shown = []
        for number, result in enumerate(results, start=1):
            name = f"query {number}" if len(results) > 1 else "query"
            heat = colormaps["viridis"](result.probability, bytes=True)[..., :3]
            shown += [
                (result.overlay(), f"{name}: {100 * result.mask.mean():.1f} % is the object"),
                (Image.fromarray(heat), f"{name}: probability, blue 0 to yellow 1"),
                (Image.fromarray(result.mask), f"{name}: mask"),
            ]
        return shown

    def tune(
        supports: list[Support],
        editor: Any,
        mask: str | None,
        value: str,
        queries: Any,
        limit: float,
        tuned: dict[str, svf_fast.Adapter],
        steps: float,
        progress: Any = gradio.Progress(track_tqdm=True),  # noqa: B008 (as gradio finds it)
    ) -> tuple[Any, ...]:
        if not supports:
            supports = [_support(editor, mask, value, gradio)]
        pictures = _queries(queries)
        with lock:
            segmenter.adapter(None)
            segmenter.threshold = limit
            segmenter.support([image for image, _ in supports], [found for _, found in supports])
            try:
                tuning = segmenter.tune(int(steps), unlabeled=pictures)
            except ValueError as error:  # the page has no such argument
                raise ValueError(str(error).removeprefix("what: ")) from error
        assert tuning.adapter is not None  # singular values are what is tuned by default
        name = f"tuned {len(tuned) + 1}"
        tuned = tuned | {name: tuning.adapter}
        file = Path(tempfile.mkdtemp(dir=folder.name)) / f"{name.replace(' ', '-')}.safetensors"
        tuning.adapter.save(file)
        switch = gradio.update(choices=[*choices, *tuned], value=name, visible=True)
        return tuned, switch, f"{name}: {tuning}", gradio.update(value=str(file), visible=True)

    def add(supports: list[Support], editor: Any, mask: str | None, value: str) -> tuple[Any, ...]:
        if len(supports) == MAX_PICTURES:
            raise ValueError(f"Supports: at most {MAX_PICTURES}.")
        supports = [*supports, _support(editor, mask, value, gradio)]
        return supports, _shown(supports, gradio), None, None

    def example() -> tuple[Any, ...]:
        (support, mask), *others = _example()
        layer = np.zeros((*mask.shape, 4), np.uint8)
        layer[mask == 1] = (*ImageColor.getrgb(ORANGE), 160)
        composite = np.array(overlay(support, mask == 1))
        editor = {"background": support, "layers": [layer], "composite": composite}
        return [], _shown([], gradio), editor, None, [(image, "") for image, _ in others]

    with gradio.Blocks(
        title="fss", analytics_enabled=False, delete_cache=(600, 3600), fill_width=False
    ) as page:
        gradio.Markdown(f"# Few-shot segmentation\n{title}")
        supports, tuned = gradio.State([]), gradio.State({})
        with gradio.Row():
            with gradio.Column():
                editor = gradio.ImageEditor(
                    label="Support: paint the object",
                    type="numpy",
                    format="png",
                    sources=["upload", "clipboard"],
                    transforms=(),
                    layers=False,
                    brush=gradio.Brush(
                        default_size=24,
                        colors=[ORANGE],
                        default_color=ORANGE,
                        color_mode="fixed",
                    ),
                    height=420,
                    elem_id="editor",
                )
                with gradio.Row():
                    add_button = gradio.Button("Add this support", elem_id="add")
                    clear_button = gradio.Button("Clear supports", elem_id="clear")
                mask = gradio.File(
                    label="or a mask file of the picture above",
                    file_types=["image"],
                    height=120,
                    elem_id="mask",
                )
                value = gradio.Textbox(
                    label="If the mask file has several objects: a class id, or red,green,blue",
                    max_lines=1,
                    elem_id="value",
                )
                added = gradio.Gallery(
                    label="Supports",
                    visible=False,
                    columns=4,
                    height=160,
                    fit_columns=False,
                    object_fit="contain",
                    elem_id="supports",
                )
            with gradio.Column():
                queries = gradio.Gallery(
                    label="Queries: drop in pictures",
                    type="filepath",
                    format="png",
                    sources=["upload", "clipboard"],
                    interactive=True,
                    columns=3,
                    height=280,
                    object_fit="contain",
                    elem_id="queries",
                )
                choice = gradio.Radio(
                    list(choices),
                    value=next(iter(choices)),
                    label="Singular values of the backbone",
                    visible=len(choices) > 1,
                    elem_id="choice",
                )
                limit = gradio.Slider(
                    0.05, 0.95, 0.5, step=0.05, label="Threshold of the probability"
                )
                with gradio.Row():
                    example_button = gradio.Button("Show an example", elem_id="example")
                    tune_button = gradio.Button("Tune", elem_id="tune")
                    button = gradio.Button("Segment", variant="primary", elem_id="segment")
                steps = gradio.Slider(5, 200, 20, step=5, label="Steps of tuning")
                told = gradio.Markdown(elem_id="tuning")
                file = gradio.File(
                    label="What was tuned, for --adapters", visible=False, elem_id="tuned"
                )
                gradio.Markdown(_HELP)
        results = gradio.Gallery(
            label="Results",
            format="png",
            columns=3,
            height=None,
            object_fit="contain",
            interactive=False,
            elem_id="results",
        )
        inputs = [supports, editor, mask, value, queries, choice, limit, tuned]
        run = _told(segment, gradio)
        gradio.on([button.click, choice.input, limit.release], run, inputs, results)
        tune_button.click(
            _told(tune, gradio),
            [supports, editor, mask, value, queries, limit, tuned, steps],
            [tuned, choice, told, file],
        ).success(run, inputs, results)
        add_button.click(
            _told(add, gradio), [supports, editor, mask, value], [supports, added, editor, mask]
        )
        clear_button.click(
            lambda: ([], _shown([], gradio), None, None), None, [supports, added, editor, mask]
        )
        example_button.click(example, None, [supports, added, editor, mask, queries]).then(
            run, inputs, results
        )
    return page


def _queries(gallery: Any) -> list[NDArray[np.uint8]]:
    """Read the pictures of the gallery of queries."""
    paths = [item[0] for item in gallery or []]
    if len(paths) > MAX_PICTURES:
        raise ValueError(f"Queries: at most {MAX_PICTURES} at a time, got {len(paths)}.")
    return [read_picture(path, "query") for path in paths]


def _support(editor: Any, mask: str | None, value: str, gradio: Any) -> Support:
    """Return the editor's picture with the painted mask, or with that of a file."""
    picture = None if editor is None else editor["background"]
    if picture is None or not picture[..., 3:].any():
        raise ValueError("Support: drop in a picture and paint the object in it.")
    picture = read_picture(picture, "support")
    size = (picture.shape[0], picture.shape[1])
    if mask is not None:
        found = find_object(mask, size, "mask", value.strip() or None)
        gradio.Info(f"Mask read as: {found.convention}")
        return picture, found.labels
    painted = np.zeros(size, bool)
    for layer in editor["layers"]:
        painted |= layer[..., 3] > 0
    if not painted.any():
        raise ValueError("Support: paint the object in the picture, or upload a mask of it.")
    return picture, painted.astype(np.uint8)


def _shown(supports: list[Support], gradio: Any) -> Any:
    pictures = [overlay(picture, mask == 1) for picture, mask in supports]
    return gradio.update(value=pictures, visible=bool(supports))


def _example() -> list[Support]:
    """Load pictures of the embedded data that show gears, with the mask of the gears."""
    source = ShapesSource(size=241, seed=7, train=1, test=50, objects=(1, 2), clutter=1)
    gear = next(c for c, name in source.class_names.items() if name == "gear")
    large = 0.07 * source.image_size**2
    shown = [i for i in source.indices("test") if source.class_areas(i).get(gear, 0) > large]
    loaded = [source.load(i) for i in shown[:4]]
    return [(picture, (classes == gear).astype(np.uint8)) for picture, classes in loaded]


def _told(function: Callable[..., Any], gradio: Any) -> Callable[..., Any]:
    """Wrap a function so that the page shows the user's errors."""

    @functools.wraps(function)  # gradio looks for the progress in the signature
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, TypeError, OSError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    return call


def find_adapters(run: str | None, adapters: tuple[str, ...]) -> dict[str, str | None]:
    """Find adapters by name; the first one, None, stands for what the segmenter came with."""
    if run is None:
        choices: dict[str, str | None] = {"pretrained": None}
    else:
        choices = {"as trained": None}
        pretrained = RunFolder.find(run)[0].pretrained
        if pretrained.is_file():
            choices = {"fine-tuned (SVF)": None, "pretrained (frozen)": str(pretrained)}
    return choices | {str(path): str(path) for path in adapters}


def _title(run: str | None, weights: str | None) -> str:
    if run is not None:
        return f"Run `{run}`"
    if weights is not None:
        return f"Matching features of `{weights}`, without training"
    return (
        "Matching features of the embedded backbone, without training: it knows rendered shapes. "
        "For photos give a trained run, `fss app RUN`, or `--weights FILE`."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _import_gradio() -> Any:
    # nothing is reported, looked up or kept in the browser
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f'fss app needs gradio, which cannot be imported ({error}): pip install "svf-fast[app]"'
        ) from error
    return gradio


class _OnlyFromHere:
    """Middleware that tells browsers to load and to ask nothing from anywhere else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy)
