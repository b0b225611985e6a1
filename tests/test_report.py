"""The report of a work directory: what it shows, and that it works in a browser."""

import dataclasses
import html.parser
import json
import re
import shlex
import shutil

import helpers
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from unet_jax import data, metrics
from unet_jax.data import pipeline
from unet_jax.data.source import Classes
from unet_jax.errors import UserError
from unet_jax.evaluation import evaluate, page, report
from unet_jax.inference import trained as trained_network
from unet_jax.workdir import files, metrics_log

NASTY = """<b>&"x"</b>$title</style></script><script>document.title="owned"</script>' onclick=alert(1) {{ 7 * 7 }}"""


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def _change_config(path, **data):
    with helpers.edited_json(path / "config.json") as values:
        values["data"] |= data


def _without_images(path, monkeypatch):
    def load(settings, split):
        raise UserError(f"no images in {settings.root}")

    _change_config(path, root="/nowhere")
    monkeypatch.setattr(data, "load", load)


def _records(names, counts):
    return metrics.records(metrics.Counts(np.array(counts), names))


def _render(names, counts, **extra):
    """A page about made-up counts."""
    palette = tuple((40 * k % 256, 90 * k % 256, 70 * k % 256) for k in range(len(names)))
    task = "multilabel" if np.ndim(counts) == 3 else "multiclass"
    values = {"name": "run", "config": tiny.get_config(), "classes": Classes(task, tuple(names), palette)}
    values |= {"step": 5, "rows": [], "runs": []}
    values["results"] = page.Results("10 images", None, _records(names, counts), np.array(counts))
    return page.render(**{**values, **extra})


def test_training_writes_a_report(trained):
    text = (trained / "report.html").read_text()
    assert text.count('<article class="card"') == 10  # the whole split, for it is smaller than 12
    assert len(text) < 2**20
    environment = files.read_environment(trained)
    assert len(environment) == 1 and environment[0]["versions"]["jax"] in text
    assert "://" not in re.sub(r'data:image/[^"]*', "", text)


def test_its_scores_are_those_of_eval_mode(copy):
    network = trained_network.load(copy)
    measured = report._measure(network, "validation", evaluate.open_split(network, copy, "validation", "none"), "none")
    result = evaluate.evaluate_workdir(copy, None, None, "validation")
    assert (measured.counts == result.confusion.sum(0)).all()
    assert measured.records == result.records and measured.loss == result.loss
    text = report.write(copy).read_text()
    scores = metrics.flatten(result.records)
    assert all(f"{scores[key]:.4f}" in text for key in ("miou", "mdice", "accuracy", "iou/square", "dice/square"))
    assert f"{result.loss:.4f}" in text
    worst = [(picture, metrics.flatten(picture.records)) for picture in measured.shown["worst"]]
    assert [scores["miou"] for _, scores in worst] == sorted(scores["miou"] for _, scores in worst)
    for picture, scores in worst:  # what is shown is what was scored
        known = picture.label != 255
        assert (picture.prediction == picture.label)[known].mean() == pytest.approx(scores["accuracy"])


def test_overlapping_masks_have_a_report(config, tmp_path):
    config.data.variant, config.data.shapes_validation, config.model.features = "multilabel", 3, (4, 8)
    text = report.write(helpers.save_untrained(tmp_path, config)).read_text()
    assert "False alarm" in text and text.count('<article class="card"') == 3
    assert "Curves" not in text  # there was no training


@pytest.mark.parametrize(
    "count, sizes",
    [(0, (0, 0, 0)), (1, (1, 0, 0)), (2, (2, 0, 0)), (3, (1, 1, 1)), (10, (6, 2, 2)), (12, (6, 3, 3)), (99, (6, 3, 3))],
)
def test_no_image_is_shown_twice(count, sizes):
    scores = [*np.random.default_rng(0).permutation(count) / 100, None]
    chosen = report.choose(scores, [str(i) for i in range(count + 1)])
    assert tuple(map(len, chosen.values())) == sizes and tuple(chosen) == ("worst", "median", "best")
    indices = [index for shown in chosen.values() for index in shown]
    assert len(set(indices)) == len(indices) and count not in indices
    assert [scores[i] for i in indices] == sorted(scores[i] for i in indices)


def test_ids_decide_between_equal_scores():
    assert report.choose([0.5, 0.5, 0.1], ["b", "a", "c"]) == {"worst": [2], "median": [1], "best": [0]}
    middle = report.choose([i / 100 for i in range(100)], [""] * 100)["median"]
    assert middle == [48, 49, 50]


def test_without_its_images_it_shows_what_is_known(copy, capsys, monkeypatch):
    (copy / "eval.json").unlink(missing_ok=True)
    step = trained_network.load(copy).step
    row = next(r for r in metrics_log.read(copy) if r["step"] == step and "val/miou" in r)
    _without_images(copy, monkeypatch)
    report.write(copy)
    assert "shows no images" in capsys.readouterr().out
    text = (copy / "report.html").read_text()
    assert "could not be read" in text and "/nowhere" in text and '<article class="card"' not in text
    assert f"{row['val/miou']:.4f}" in text and 'class="matrix"' not in text
    scored = {"step": step, "split": "validation", "images": 7, "tta": "flips", "data_root": "/nowhere", "loss": 0.125}
    scored |= {"miou": 0.4321, "iou": {"square": 0.9876}, "confusion": np.eye(7, dtype=int).tolist()}
    for change, used in (({}, True), ({"split": "test"}, False), ({"data_root": "/elsewhere"}, False)):
        (copy / "eval.json").write_text(json.dumps(scored | change))
        text = report.write(copy).read_text()
        assert ("eval.json, 7 validation images, test-time augmentation flips" in text) == used
        assert ('class="matrix"' in text) == used
        assert all((number in text) == used for number in ("0.1250", "0.4321", "0.9876"))


def test_an_image_that_vanishes_in_between_does_not_end_in_an_error(copy, monkeypatch):
    def vanished(*_):
        raise UserError("image 7 is gone")

    monkeypatch.setattr(pipeline.Pipeline, "eval_batches", vanished)
    assert "image 7 is gone" in report.write(copy).read_text()


def test_a_training_without_a_checkpoint_has_none(copy, tmp_path):
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="stopped before its first one"):
        report.write(copy)
    with pytest.raises(UserError, match=r"has no config.json"):
        report.write(tmp_path / "nothing")


def test_an_older_training_has_no_environment(copy):
    (copy / "environment.json").unlink()
    report.write(copy)
    text = (copy / "report.html").read_text()
    assert "not recorded" in text and "python -m unet_jax.main --config=" in text


def _render_everywhere(value):
    """A page with a text in every place where one can come in from a file."""
    run = {"first_step": value, "command": f"python -m unet_jax.main --workdir={shlex.quote(value)}", "commit": value}
    run |= {"devices": value, "platform": value, "versions": {value: value}}
    names, counts = (value, "other"), np.array([[256, 0], [0, 0]])
    label = np.zeros((16, 16), np.uint8)
    picture = page.Picture(value, _records(names, counts), label[..., None], label, label)
    records = [dataclasses.replace(r, title=value, note=value) for r in _records(names, counts)]
    shown = {"worst": [picture], "median": [], "best": []}
    config = ConfigDict({**tiny.get_config().to_dict(), "other": {value: value}}, allow_dotted_keys=True)
    config.data.root = value
    return _render(
        names,
        counts,
        name=value,
        config=config,
        rows=[{"step": 1, "epoch": 1, "train/loss": 0.5, value: value, f"val/iou/{value}": value}],
        runs=[run, run],
        missing=value,
        results=page.Results(value, 1.0, records, counts, shown),
    )


def _elements(text):
    """The elements of a page, each with the names of its attributes."""
    found = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, [name for name, _ in attributes]))
    parser.feed(text)
    return found


def test_every_value_is_escaped():
    text = _render_everywhere(NASTY)
    assert _elements(text) == _elements(_render_everywhere("harmless"))
    assert text.count("&lt;/script&gt;&lt;script&gt;document.title=&#34;owned&#34;") >= 20
    classes = Classes("multiclass", ("a", "b"), (("red;--x:url(//example.org)", 0, 1), (1, 1, 1)))
    assert 'style="background:rgb(0,0,1)"' in _render(("a", "b"), np.eye(2), classes=classes)
    names = "photo_\udce9 \x1b[2J\x00"  # of files: bytes that are not UTF-8, control characters
    text = _render(("a", "b"), np.eye(2), missing=names, name=names)
    assert text.encode().count(rb"photo_\udce9 \x1b[2J\x00") == 3


def test_a_new_metric_is_shown_without_another_change(monkeypatch):
    def boundary_scores(counts):
        distances = {name: 10.0 + k for k, name in enumerate(counts.names)}
        return [
            metrics.Record("boundary", "boundary F1", 0.6789),
            metrics.Record("distance", "distance", distances, higher_is_better=False),
        ]

    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, boundary_scores))
    rows = [{"step": s, "epoch": s, "val/boundary": 0.1 * s} for s in (1, 2)]
    text = _render(("a", "b"), [[2, 2], [0, 4]], rows=rows)
    assert "<dt>boundary F1</dt><dd>0.6789</dd>" in text and 'alt="Validation scores over epochs"' in text
    assert '<th scope="col">distance</th>' in text
    assert '<td class="bar"><div>11.0000</div></td>' in text  # no bar: it is no share
    assert '<div>0.5000<i style="--v:50.00%"></i></div>' in text


def test_absent_classes_are_shown_as_absent():
    text = _render(("a", "b", "c"), [[2, 2, 0], [0, 4, 0], [0, 0, 0]])
    assert text.count('<span class="absent">absent</span>') == 2
    assert '<td class="absent" colspan="3">absent</td>' in text
    assert ">50.0</td>" in text and ">100.0</td>" in text


# In a browser.


@pytest.fixture(scope="module")
def browser():
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} to open the report in")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, trained):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get((trained / "report.html").as_uri())
    return browser


def _narrow(browser):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _fits(browser):
    return browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_it_opens_without_console_messages_and_without_a_network(opened):
    assert opened.get_log("browser") == []
    images = opened.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(images) == 2 + 4 * 10
    assert all(complete and width > 0 for complete, width in images)
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)


def test_its_controls_work_by_mouse_and_keyboard(opened):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    cards = opened.find_elements(By.CSS_SELECTOR, ".card")
    card, other = cards[:2]
    layers = (
        "return [...arguments[0].querySelectorAll('.image ~ img')].filter(i => getComputedStyle(i).display != 'none')"
    )
    layer = lambda card: opened.execute_script(f"{layers}.map(i => i.className)", card)
    opacity = lambda: float(card.find_element(By.CSS_SELECTOR, f".{layer(card)[0]}").value_of_css_property("opacity"))
    radios = {r.get_attribute("value"): r for r in card.find_elements(By.CSS_SELECTOR, "[type=radio]")}
    slider = card.find_element(By.CSS_SELECTOR, "[type=range]")

    assert layer(card) == ["error"] and opacity() == 1
    radios["ground-truth"].click()
    assert layer(card) == ["ground-truth"] and layer(other) == ["error"]
    radios["ground-truth"].send_keys(Keys.ARROW_RIGHT)
    assert layer(card) == ["prediction"]
    radios["prediction"].send_keys(Keys.TAB)
    assert opened.switch_to.active_element == slider
    slider.send_keys(Keys.ARROW_LEFT)
    assert opacity() == pytest.approx(0.95)
    handle = slider.size["width"] / 2 - 8
    ActionChains(opened).move_to_element_with_offset(slider, 0, 0).click_and_hold().move_by_offset(
        -int(handle / 2), 0
    ).release().perform()
    assert opacity() == pytest.approx(0.25, abs=0.1)

    # The controls above the cards change all of them.
    every = opened.find_element(By.CSS_SELECTOR, ".all")
    every.find_element(By.CSS_SELECTOR, "[value=ground-truth]").click()
    assert [layer(card) for card in cards] == [["ground-truth"]] * 10
    every.find_element(By.CSS_SELECTOR, "[type=range]").send_keys(Keys.HOME)
    assert opacity() == 0
    opened.find_element(By.CSS_SELECTOR, "summary").send_keys(Keys.ENTER)
    assert "learning_rate" in opened.find_element(By.CSS_SELECTOR, "details").text
    assert opened.get_log("browser") == []


def test_nothing_but_its_own_script_runs(opened, trained, tmp_path):
    text = (trained / "report.html").read_text()
    hostile = """
        <script>window.owned = 1</script><script src="data:text/javascript,window.owned = 2"></script>
        <img src="x" onerror="window.owned = 3"><img id="remote" src="http://127.0.0.1:9/x.png">
        <style>main { display: none }</style><base href="http://127.0.0.1:9/">
        <a id="link" href="javascript:window.owned = 4">x</a>
        <iframe srcdoc="<script>top.owned = 5</script>"></iframe>"""
    (tmp_path / "hostile.html").write_text(text.replace("<main>", hostile + "<main>", 1))
    opened.get((tmp_path / "hostile.html").as_uri())
    opened.find_element("id", "link").click()
    assert opened.execute_script("return [window.owned ?? 0, document.baseURI.slice(0, 5)]") == [0, "file:"]
    refused = [entry["message"] for entry in opened.get_log("browser")]
    assert sum("Content Security Policy" in message for message in refused) >= 7
    # The controls, the style and the colours of the classes still work.
    card = opened.find_element("css selector", ".card")
    card.find_element("css selector", "[value=prediction]").click()
    assert card.get_attribute("data-layer") == "prediction"
    swatches = opened.find_elements("class name", "swatch")
    for swatch, color in zip(swatches, json.loads((trained / "classes.json").read_text())["palette"], strict=False):
        assert re.findall(r"\d+", swatch.value_of_css_property("background-color"))[:3] == [*map(str, color)]


def test_it_is_readable_on_a_phone(opened):
    _narrow(opened)
    assert opened.execute_script("return window.innerWidth") == 390
    assert _fits(opened)
    smallest = opened.execute_script(
        "return Math.min(...[...document.querySelectorAll('main *')].filter(e => e.textContent.trim())"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 14


def test_many_classes_scroll_in_their_own_box(opened, tmp_path):
    names = [f"a rather long name of class {k}" for k in range(23)]
    counts = np.random.default_rng(0).integers(0, 1000, (23, 23)) + 5000 * np.eye(23, dtype=int)
    counts[5] = 0
    (tmp_path / "many.html").write_text(_render(names, counts))
    opened.get((tmp_path / "many.html").as_uri())
    _narrow(opened)
    assert _fits(opened)
    box = "document.querySelector('.box:has(.matrix)')"
    assert opened.execute_script(f"return {box}.scrollWidth > {box}.clientWidth")


def test_it_follows_the_colours_of_the_reader(opened):
    looks = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        looks.append(
            opened.execute_async_script(
                "const [done] = arguments, body = getComputedStyle(document.body);"
                "setTimeout(() => done([body.backgroundColor, body.color,"  # pictures follow a little later
                "document.querySelector('picture img').currentSrc]), 200)"
            )
        )
    light, dark = looks
    brightness = lambda color: sum(map(int, re.findall(r"\d+", color)[:3]))
    assert brightness(light[0]) > 600 > 200 > brightness(dark[0])
    assert brightness(light[1]) < 200 < 600 < brightness(dark[1])
    assert light[2] != dark[2]
