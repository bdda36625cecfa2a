"""The page in a real browser without a screen; skipped where there is none."""

from __future__ import annotations

import io
import json
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib
from shutil import which

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

import svf_fast
from fss.cli import main
from fss.data import ShapesSource
from fss.segment import app
from fss.segment.segmenter import FewShotSegmenter
from fss.training.run import train

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 120  # seconds; a busy machine takes some for what takes one
SIZE = (90, 120)


class Recorder(FewShotSegmenter):
    """Keeps what the page gives as supports, and which adapter it sets."""

    def support(self, images, masks):
        self.given = list(zip(images, masks, strict=True))
        return super().support(images, masks)

    def adapter(self, adapter):
        self.chosen = adapter


@pytest.fixture(scope="module")
def segmenter():
    return Recorder(size=65, device="cpu")


@pytest.fixture(scope="module")
def address(segmenter):
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "svf-fast[app]"')
    limit = Image.MAX_IMAGE_PIXELS
    page = app.build_page(segmenter, {"tuned": None, "pretrained": "file"}, "a test")
    yield app.launch(page)
    page.close()
    Image.MAX_IMAGE_PIXELS = limit


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = next((path for name in BROWSERS if (path := which(name))), None)
    service = which("chromedriver")
    if browser is None or service is None:
        pytest.skip("no chromium with chromedriver is installed (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu",
                     "window-size=1280,1400"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, address):
    driver.get(address)
    return Page(driver)


class Page:
    def __init__(self, driver) -> None:
        self.driver = driver
        self.until(lambda: self.all("#editor canvas"))

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def until(self, condition):
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < end, self.driver.find_element("tag name", "body").text
            time.sleep(0.1)
        return found

    def click(self, name: str) -> None:
        self.driver.find_element("id", name).click()

    def upload(self, name: str, path) -> None:
        self.until(lambda: self.all(f"#{name} input[type=file]"))[0].send_keys(str(path))

    def upload_support(self, path) -> None:
        self.upload("editor", path)
        self.until(lambda: not self.all("#editor .upload-message"))
        time.sleep(2)  # until the picture has its place

    def sources(self) -> list[str]:
        images = "[...document.querySelectorAll('#results img')]"
        return self.driver.execute_script(f"return {images}.map(image => image.src)")

    def results(self, count: int) -> list[Image.Image]:
        self.until(lambda: len(self.sources()) == count)
        read = [urllib.request.urlopen(source).read() for source in self.sources()]
        return [Image.open(io.BytesIO(content)) for content in read]

    def mask(self) -> bool:
        """Whether a mask file is shown; its name and its ending are in lines of their own."""
        return "mask.png" in self.driver.find_element("id", "mask").text.replace("\n", "")

    def error(self) -> str:
        return self.until(lambda: " ".join(toast.text for toast in self.all(".toast-body.error")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two pictures and the mask of a class in the first."""
    folder = tmp_path_factory.mktemp("photos")
    source = ShapesSource(size=SIZE[1])
    image, classes = source.load(2003)
    image, classes = image[: SIZE[0]], classes[: SIZE[0]]
    Image.fromarray(image).save(folder / "support.png")
    mask = classes == classes[classes > 0][0]
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(source.load(2004)[0][:70]).save(folder / "query.png")
    return folder


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path))


def test_one_click_shows_an_example(page, segmenter, address):
    page.click("example")
    results = page.results(9)
    assert {image.size for image in results} == {(241, 241)}
    (picture, mask), *others = app._example()
    np.testing.assert_array_equal(segmenter.given[0][0], picture)
    np.testing.assert_array_equal(segmenter.given[0][1], mask)
    result = segmenter(others[0][0])
    np.testing.assert_array_equal(np.array(results[0]), np.array(result.overlay()))
    np.testing.assert_array_equal(np.array(results[2].convert("L")) > 0, result.mask)
    asked = {
        event["params"]["request"]["url"]
        for line in page.driver.get_log("performance")
        if (event := json.loads(line["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    }
    local = (address, "data:", "blob:", "chrome:")
    assert any(url.startswith(address) for url in asked)
    assert not [url for url in asked if not url.startswith(local)]


def test_a_painted_object_is_found_in_uploads(page, segmenter, photos):
    from selenium.webdriver import ActionChains

    page.upload_support(photos / "support.png")
    page.upload("queries", photos / "query.png")
    page.until(lambda: page.all("#queries img"))
    canvas = page.all("#editor canvas")[0]
    chain = ActionChains(page.driver).move_to_element(canvas).click_and_hold()
    for _ in range(5):
        chain = chain.move_by_offset(8, 4)
    chain.release().perform()
    time.sleep(1)
    page.click("segment")
    overlay, heat, mask = page.results(3)
    assert overlay.size == heat.size == mask.size == (120, 70)
    ((picture, painted),) = segmenter.given
    np.testing.assert_array_equal(picture, pixels(photos / "support.png"))
    rows, columns = np.nonzero(painted)
    assert 0.002 < painted.mean() < 0.5
    assert abs(rows.mean() - SIZE[0] / 2) < 25 and abs(columns.mean() - SIZE[1] / 2) < 35
    expected = segmenter(pixels(photos / "query.png"))
    np.testing.assert_array_equal(np.array(overlay), np.array(expected.overlay()))


def test_masks_several_supports_and_another_adapter(page, segmenter, photos):
    page.upload("queries", photos / "query.png")
    for count in (1, 2):
        page.upload_support(photos / "support.png")
        page.upload("mask", photos / "mask.png")
        page.until(page.mask)
        page.click("add")
        page.until(lambda count=count: len(page.all("#supports img")) == count)
        page.until(lambda: not page.mask())
    page.click("segment")
    page.results(3)
    assert segmenter.chosen is None and len(segmenter.given) == 2
    for picture, mask in segmenter.given:
        np.testing.assert_array_equal(picture, pixels(photos / "support.png"))
        np.testing.assert_array_equal(mask, pixels(photos / "mask.png"))
    page.all("#choice input")[1].click()
    page.until(lambda: segmenter.chosen == "file")
    page.click("clear")
    page.until(lambda: not page.all("#supports img"))
    page.click("segment")
    assert "Support: " in page.error()


@pytest.mark.parametrize("value", ["7", "9", ""])
def test_a_value_of_a_mask_file_is_chosen(page, segmenter, photos, tmp_path, value):
    """Of two class ids; without a value they are an error, and how a mask was read is said."""
    ids = pixels(photos / "mask.png") * np.uint8(7)
    ids[:20, :20] = 9
    Image.fromarray(ids).save(tmp_path / "mask.png")
    page.upload("queries", photos / "query.png")
    page.upload_support(photos / "support.png")
    page.upload("mask", tmp_path / "mask.png")
    page.until(page.mask)
    if not value:
        page.click("add")
        assert "values 7, 9" in page.error()
        return
    page.all("#value input, #value textarea")[0].send_keys(value)
    time.sleep(1)
    page.click("segment")
    page.until(lambda: f"the value {value}" in " ".join(t.text for t in page.all(".toast-body")))
    page.results(3)
    np.testing.assert_array_equal(segmenter.given[0][1], ids == int(value))


def test_a_run_and_its_pretrained_backbone_by_a_click(driver, tiny, photos):
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "svf-fast[app]"')
    config = tiny(steps=2, optimizer={"backbone_lr": 3.0})
    train(config)
    tuned = FewShotSegmenter.load(config.out, device="cpu")
    served = app.build_page(tuned, app.find_adapters(config.out, ()), "a test")
    driver.get(app.launch(served))
    page = Page(driver)
    page.upload("queries", photos / "query.png")
    page.upload_support(photos / "support.png")
    page.upload("mask", photos / "mask.png")
    page.until(page.mask)
    page.click("add")
    page.until(lambda: page.all("#supports img"))
    names = [label.text for label in page.all("#choice label")]
    assert names == ["fine-tuned (SVF)", "pretrained (frozen)"]
    seen: list[bytes] = []
    for choice in (0, 1, 0):
        former = page.sources()
        page.all("#choice input")[choice].click()
        time.sleep(1)  # until the adapter is set
        page.click("segment")
        # a picture's address tells its content: it changes when the switch changes the result
        page.until(lambda former=former: page.sources() not in ([], former))
        seen.append(page.results(3)[1].convert("RGB").tobytes())
    served.close()
    assert seen[0] == seen[2] != seen[1]


def test_a_click_tunes_and_shows_what_it_finds(driver, photos):
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "svf-fast[app]"')
    own = FewShotSegmenter(size=65, device="cpu")
    served = app.build_page(own, {"pretrained": None}, "a test")
    driver.get(app.launch(served))
    page = Page(driver)
    page.upload("queries", photos / "query.png")
    page.until(lambda: page.all("#queries img"))
    page.click("tune")
    assert "Support: " in page.error() and not page.sources()
    page.upload_support(photos / "support.png")
    page.upload("mask", photos / "mask.png")
    page.until(page.mask)
    page.click("tune")
    page.until(lambda: "tuned 1: tuned svf on 1 support" in page.all("#tuning")[0].text)
    shown = [label.text for label in page.all("#choice label")]
    assert shown == ["pretrained", "tuned 1"]
    assert page.all("#choice input")[1].is_selected()
    (link,) = page.until(lambda: page.all("#tuned a[download]"))
    saved = urllib.request.urlopen(link.get_attribute("href")).read()
    (photos / "tuned.safetensors").write_bytes(saved)
    after = page.results(3)[1].convert("RGB").tobytes()  # without another click
    page.all("#choice input")[0].click()
    page.until(lambda: page.results(3)[1].convert("RGB").tobytes() != after)
    before = page.results(3)[1].convert("RGB").tobytes()
    served.close()
    other = FewShotSegmenter(size=65, device="cpu")
    other.support([pixels(photos / "support.png")], [pixels(photos / "mask.png") > 0])
    for adapter, expected in (None, before), (photos / "tuned.safetensors", after):
        other.adapter(adapter)
        found = other(pixels(photos / "query.png")).probability
        assert colormaps["viridis"](found, bytes=True)[..., :3].tobytes() == expected


def test_tuned_classes_are_switched_between(photos, monkeypatch):
    """What the button calls, without a browser; the list is that of a session."""
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "svf-fast[app]"')
    own = FewShotSegmenter(size=65, device="cpu")
    built = app.build_page(own, {"pretrained": None}, "a test")
    tune, segment = (
        next(each.fn for each in built.fns.values() if each.name == name)
        for name in ("tune", "segment")
    )
    support = pixels(photos / "support.png"), pixels(photos / "mask.png") > 0
    tuned: dict = {}
    queries = [(photos / "query.png", None)]
    for count in (1, 2):
        tuned, switch, told, file = tune([support], None, None, "", queries, 0.5, tuned, 1)
        assert list(tuned) == [f"tuned {number + 1}" for number in range(count)]
        assert switch["choices"] == ["pretrained", *tuned] and switch["value"] == f"tuned {count}"
        begin = f"tuned {count}: tuned svf on 1 support and 1 picture without a mask: held-out"
        assert begin in told
        assert svf_fast.Adapter.load(file["value"]).card["shots"] == 1
    # from here on nothing is decomposed
    monkeypatch.setattr(torch.linalg, "svd", None)
    for choice in ("pretrained", "tuned 2", "tuned 1"):
        shown = segment([support], None, None, "", queries, choice, 0.5, tuned)
        expected = own(photos / "query.png").overlay()
        np.testing.assert_array_equal(np.array(shown[0][0]), np.array(expected))


def test_what_is_missing_is_said(page, photos):
    page.click("segment")
    assert "drop in a picture and paint the object" in page.error()


def test_a_picture_of_too_many_pixels_is_refused(page, tmp_path, photos):
    """A file of some KB that would be decoded to 600 MB."""
    row = b"\0" + bytes(20_000 // 8)
    packer = zlib.compressobj()
    data = b"".join(packer.compress(row) for _ in range(10_000)) + packer.flush()
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    (tmp_path / "large.png").write_bytes(png)
    page.upload_support(photos / "support.png")
    page.upload("mask", photos / "mask.png")
    page.until(page.mask)
    page.upload("queries", tmp_path / "large.png")
    page.until(lambda: page.all("#queries button img") or page.all("#queries img"))
    page.click("segment")
    assert "large.png" in page.error()


def test_the_page_loads_nothing_from_elsewhere(address):
    response = urllib.request.urlopen(address)
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert address.startswith("http://127.0.0.1:")


def test_large_files_are_refused(address):
    boundary = b"x" * 20
    body = b"--%s\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n" % boundary
    body += bytes(app.MAX_BYTES + 1) + b"\r\n--%s--\r\n" % boundary
    request = urllib.request.Request(
        f"{address}gradio_api/upload",
        body,
        {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"},
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 413


def test_without_gradio_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert 'pip install "svf-fast[app]"' in capsys.readouterr().err


def test_adapters_of_a_run_and_others(tmp_path):
    assert app.find_adapters(None, ()) == {"pretrained": None}
    assert app.find_adapters(str(tmp_path), ("a.st",)) == {"as trained": None, "a.st": "a.st"}
    frozen = tmp_path / "pretrained.safetensors"
    frozen.touch()
    expected = {"fine-tuned (SVF)": None, "pretrained (frozen)": str(frozen)}
    assert app.find_adapters(str(tmp_path), ()) == expected
    assert app.find_adapters(str(tmp_path / "best.pt"), ()) == expected


@pytest.mark.parametrize(
    "host, inside",
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_which_hosts_only_this_machine_reaches(host, inside):
    assert app._is_loopback(host) == inside


def test_the_example_can_be_solved():
    (support, mask), *others = app._example()
    segmenter = FewShotSegmenter(device="cpu").support(support, mask)
    with torch.no_grad():
        results = segmenter([picture for picture, _ in others])
    scores = [
        (result.mask & truth).sum() / (result.mask | truth).sum()
        for result, (_, truth) in zip(results, others)
    ]
    assert len(scores) == 3 and np.mean(scores) > 0.4
