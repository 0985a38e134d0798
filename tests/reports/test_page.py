"""The page in a real browser, opened from disk."""

import re
import shutil
import warnings
from html import unescape
from itertools import pairwise

import numpy as np
import pytest
import torch

from detguard.detections import Detections
from detguard.files import printable
from detguard.overlay import before_after, class_colour, draw_detections
from detguard.reports.evaluation import with_error
from detguard.reports.marks import of_labels
from detguard.reports.page import Item, linked, pair, panel, render_page
from detguard.reports.plots import LOOKS, budget_plot, corruption_plot, gate_plot, plots, precision_plot, training_plot
from detguard.reports.tables import Table

CHROMIUM = shutil.which("chromium")
METRICS = {
    name: {
        "clean": {"AP": ap, "AP50": ap + 0.1, "photos": 4, "classes": 2},
        "corruptions": {
            "mPC": ap / 2,
            "rPC": 0.5,
            "kinds": {
                kind: {"AP": 0.2, "severities": {s: {"AP": ap / int(s)} for s in "135"}} for kind in ("fog", "snow")
            },
        },
        "attack": {"budgets": {e: {"AP": 0.1, "attacks": {"worst": {"AP": 0.1}, "all-0": {"AP": 0.12}}} for e in "24"}},
    }
    for name, ap in (("first", 0.4), ("second", 0.5))
}
CURVES = {"first": {"clean": [1.0] * 101, "attack": [0.5] * 101}, "second": {"clean": [0.9] * 101}}
HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    photo = np.full((240, 320, 3), 90, np.uint8)
    boxes = [{"class": "person", "confidence": 0.9, "box": box} for box in ([20, 30, 120, 200], [300, 2, 320, 200])]
    odd = [
        {"class": "car", "confidence": 0.5, "box": [20, 30, 300, 200]},
        {"class": HOSTILE, "confidence": 0.4, "box": [280, 2, 320, 200], "kind": "missed"},
    ]
    items = [
        Item(
            f"photo {i}",
            "failed" if i == 2 else "fooled",
            "a note",
            [pair(panel("before", photo, boxes), panel("after", photo, odd if i else []), (photo, photo + 1))],
            [panel("jpeg:75: fooled", photo[:120])],
            {"png": linked(f"adversarial/{HOSTILE}.png")},
        )
        for i in range(3)
    ]
    rows = [["first", ".400", "", ".1"], [HOSTILE, ".500", "", "-"], ["c", "-", "", ".2"], ["d", ".450", "", "1.000"]]
    rows = [[*row, "as long as a sentence", "and as another"] for row in rows]
    head = ["a model", "AP of clean photos", "empty", "AP of attacked photos", "words", "more"]
    models = [
        f"{model}, eps 4, {what}" for model in ("detguard-n-hard", "yolo11n") for what in ("clean", "worst attack")
    ]
    numbers = Table("Numbers", ["AP", *models, "their mean"], [["of small objects", *[".123"] * 5]])
    events = Table("Events", ["event", "what"], [["deployed", f"photo 9: {'/folder' * 9}/adapted.safetensors"]])
    tables = [Table("Result", head, rows, "A note."), numbers, events]
    made = plots(METRICS, CURVES)
    assert len(made) == 3
    page = render_page(
        f"Title {HOSTILE}",
        f"AP .4 {HOSTILE}",
        "subtitle",
        ["detguard", "attack", "a b.jpg"],
        tables,
        made,
        items,
        left_out=5,
    )
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_bytes(page)
    return file


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, page_file):
    """The page at 1280 px, and lists of the console's errors and of requests that leave the file."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    yield page, errors, requests
    page.close()


def test_it_loads_without_errors_or_requests(opened, page_file):
    page, errors, requests = opened
    assert errors == []
    assert [r for r in requests if not r.startswith("data:")] == [page_file.as_uri()]
    assert page.locator(".item").count() == 3
    assert page.locator(".plot svg").count() == 3


def test_text_from_data_is_text(opened):
    page, _, _ = opened
    assert page.evaluate("window.hacked") is None
    assert "onerror" in page.locator("h1").inner_text()


def test_the_slider_moves_the_edge_between_before_and_after(opened):
    page, _, _ = opened
    page.set_viewport_size({"width": 390, "height": 800})
    pair = page.locator(".pair").first
    pair.scroll_into_view_if_needed()
    box = pair.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.2, box["y"] + box["height"] / 2)
    edge = page.locator(".edge").first.bounding_box()
    assert abs(edge["x"] - (box["x"] + box["width"] * 0.2)) < 0.05 * box["width"]
    page.keyboard.press("End")
    assert pair.evaluate("e => getComputedStyle(e.querySelector('.after')).clipPath") == "inset(0px 0px 0px 100%)"


def test_outcomes_filter_the_gallery(opened):
    page, _, _ = opened
    page.get_by_role("button", name="failed (1)").click()
    assert page.locator(".item:visible").count() == 1
    assert page.locator(".item:visible b").inner_text() == "photo 2"
    page.get_by_role("button", name="all (3)").click()
    assert page.locator(".item:visible").count() == 3


def test_boxes_switch_off(opened):
    page, _, _ = opened
    assert page.locator(".box:visible").count() == 10
    page.get_by_label("boxes", exact=True).uncheck()
    assert page.locator(".box:visible").count() == 0


def test_boxes_lie_where_the_detections_are(opened):
    page, _, _ = opened
    pair, box = page.locator(".before").first.bounding_box(), page.locator(".before .box").first.bounding_box()
    assert (box["x"] - pair["x"]) / pair["width"] == pytest.approx(20 / 320, abs=0.01)
    assert box["height"] / pair["height"] == pytest.approx(170 / 240, abs=0.01)


def test_before_after_and_difference_stand_side_by_side_where_there_is_room(opened):
    page, _, _ = opened
    places = [page.locator(f".{side}").first.bounding_box() for side in ("before", "after", "difference")]
    assert len({place["y"] for place in places}) == 1
    assert all(a["x"] + a["width"] <= b["x"] for a, b in pairwise(places))


def test_labels_lie_in_the_part_of_a_photo_that_is_seen(opened):
    page, _, _ = opened
    photo, label = (page.locator(one).first.bounding_box() for one in (".before", ".before .box:nth-of-type(2) span"))
    assert label["y"] >= photo["y"]
    assert label["x"] + label["width"] <= photo["x"] + photo["width"] + 1
    page.set_viewport_size({"width": 390, "height": 800})
    photo = page.locator(".after").nth(1).bounding_box()
    label = page.locator(".after").nth(1).locator(".box span").first.bounding_box()
    assert label["x"] >= photo["x"] + photo["width"] / 2 - 1


def test_labels_of_boxes_that_coincide_lie_under_each_other(browser, tmp_path):
    photo = np.full((240, 320, 3), 90, np.uint8)
    boxes = [{"class": one, "confidence": 0.9, "box": [20, 40, 120, 200]} for one in ("person", "rider", "car")]
    items = [Item("photo", "failed", "", [pair(panel("before", photo, boxes), panel("after", photo, []))])]
    (tmp_path / "report.html").write_bytes(render_page("a", "b", "c", ["detguard"], [], {}, items, left_out=0))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    first, second, third = (label.bounding_box() for label in page.locator(".before .box span").all())
    page.close()
    assert first["x"] == second["x"] == third["x"]
    assert first["y"] + first["height"] == pytest.approx(second["y"], abs=1)
    assert second["y"] + second["height"] == pytest.approx(third["y"], abs=1)


def test_a_press_zooms_and_another_closes(opened):
    page, _, _ = opened
    page.locator(".difference").first.click()
    assert page.locator("dialog .layer").bounding_box()["width"] > 1000
    page.locator("dialog .layer").click()
    assert not page.locator("dialog").is_visible()


def test_links_lead_into_the_run_alone(opened):
    page, _, _ = opened
    links = page.locator(".item a").evaluate_all("links => links.map(one => one.getAttribute('href'))")
    assert len(links) == 3
    assert all(link.startswith("./adversarial/%3C/script") for link in links)
    assert linked("//host/x") == ".///host/x"
    assert linked("javascript:x") == "./javascript%3Ax"


def test_a_name_that_no_file_system_has_is_a_link_as_well():
    assert linked("overlays/\udcff.png") == "./overlays/%FF.png"
    assert linked("overlays/\ud800.png") == "./overlays/%5Cud800.png"


def test_tables_sort_by_a_press_and_leave_out_what_is_empty(opened):
    page, _, _ = opened
    table = page.locator("table").first

    def column(number):
        return table.locator(f"tbody td:nth-child({number})").all_inner_texts()

    assert table.locator("th").count() == 5
    page.get_by_role("button", name="AP of attacked photos").click()
    assert column(3) == ["1.000", ".2", ".1", "-"]
    page.get_by_role("button", name="AP of attacked photos").click()
    assert column(3) == [".1", ".2", "1.000", "-"]
    page.get_by_role("button", name="a model").click()
    assert column(1)[1:] == ["c", "d", "first"]


def test_rows_of_different_figures_do_not_sort_and_names_in_heads_are_not_broken(browser, tmp_path):
    names = [f"00{i}: detguard-n" for i in range(5)]
    rows = [[figure, *["eps 4, 20 steps"] * 5] for figure in ("clean AP", "attack", "mPC", "rPC")]
    page = render_page("", "", "", [], [Table("", ["", *names], rows)], {})
    assert b"Photos are shown" not in page
    (tmp_path / "page.html").write_bytes(page)
    opened = browser.new_page(viewport={"width": 640, "height": 800})
    opened.goto((tmp_path / "page.html").as_uri())
    assert opened.locator("th button").count() == 0
    assert opened.locator("th").nth(1).inner_text() == names[0]
    lines = opened.locator("th span").evaluate_all("e => e.map(one => one.getClientRects().length)")
    assert lines == [1] * 10
    opened.close()


def test_two_pictures_without_a_difference_fill_their_card(browser, tmp_path):
    photo = panel("", np.zeros((90, 160, 3), np.uint8))
    page = render_page("", "", "", [], [], {}, [Item("", "", "", [pair(photo, photo)])])
    assert b"Photos are shown" in page
    (tmp_path / "page.html").write_bytes(page)
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    opened.goto((tmp_path / "page.html").as_uri())
    card, pictures = (opened.locator(one).first.bounding_box()["width"] for one in (".item", ".pair"))
    assert pictures > 0.99 * card
    opened.close()


def test_rows_of_wide_tables_are_cards_on_a_phone(opened):
    page, _, _ = opened
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.locator("thead").first.is_hidden()
    assert page.locator("tbody td").nth(1).evaluate("e => getComputedStyle(e, '::before').content") == (
        '"AP of clean photos"'
    )


def test_plots_follow_the_dark_mode(browser, page_file):
    page = browser.new_page(color_scheme="dark")
    page.goto(page_file.as_uri())
    colours = page.locator(".plot svg :is(path, use, g)").evaluate_all(
        "drawn => drawn.map(e => getComputedStyle(e)).flatMap(e => [e.fill, e.stroke])"
    )
    page.close()
    assert {"rgb(230, 235, 241)", "rgb(122, 165, 255)"} <= set(colours)
    assert not {"rgb(22, 32, 44)", "rgb(37, 99, 235)", "rgb(255, 255, 255)"} & set(colours)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_of_the_window(browser, page_file, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.locator(".scroll").evaluate_all("e => e.map(one => one.scrollWidth > one.clientWidth)")
    assert cut[1:] == [False, False]
    cut = page.locator(".plot").evaluate_all("e => e.map(one => one.scrollWidth > one.clientWidth)")
    assert cut == [False, False, width == 390]
    page.close()


def test_the_command_is_quoted_for_a_shell(page_file):
    assert "detguard attack 'a b.jpg'" in unescape(re.search(r"<pre>(.*?)</pre>", page_file.read_text())[1])


NAMES = [r"cost$\frac$", "_hidden", "a\x1b[31m\n\u202e\udcff", "汉字", "x" * 250, "--><script>"]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_plots_are_text_and_none_is_left_out(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = [
            budget_plot({name: METRICS["first"]}),
            gate_plot([name, "other"], {name: [0.2, 0.8]}),
            training_plot([{"stage": name, "batch": batch, "normal": 1.0} for batch in range(2)]),
            precision_plot({name: CURVES["first"]}),
        ]
    for svg in made:
        # Matplotlib says in a comment what it draws, as the file is to be one of XML.
        assert printable(name).replace("-->", "- -&gt;").replace("<", "&lt;").replace(">", "&gt;") in svg
        assert not {character for character in svg if not character.isprintable()} - {"\n"}


def test_names_on_the_page_are_shown_and_not_obeyed():
    name = "a\x1b\u202egnp.exe\udcff<b>"
    table = Table(name, [name, "b"], [[name, name]], name)
    page = render_page(name, name, name, [name], [table], {name: "<svg/>"}).decode()
    assert page.count(r"a\x1b\u202egnp.exe\udcff&lt;b&gt;") == 13
    assert "<svg/>" in page


def test_names_on_overlays_are_shown(bus):
    found = Detections(torch.tensor([[10.0, 10.0, 200.0, 200.0]]), torch.tensor([0.9]), torch.tensor([0]))
    names = {0: "two\nlines\x1b\udcff"}
    assert before_after(bus, found, bus, found, names).shape[1] > 3 * bus.shape[1]
    assert np.array_equal(draw_detections(bus, found, names), draw_detections(bus, found, {0: printable(names[0])}))


def test_no_panel_of_corruptions_cuts_off_what_others_reach(monkeypatch):
    """Of panels that share an axis, the first drawn must not end its scaling."""
    kinds = {kind: {"severities": {"1": {"AP": ap}, "2": {"AP": ap}}} for kind, ap in (("fog", 0.1), ("snow", 0.9))}
    monkeypatch.setattr("detguard.reports.plots._svg", lambda figure: figure)
    figure = corruption_plot({"one": {"corruptions": {"kinds": kinds}}})
    low, high = figure.axes[0].get_ylim()
    assert low == 0
    assert high > 0.9
    assert [axis.get_title() for axis in figure.axes] == ["fog", "snow"]  # and no empty ones


def test_a_legend_tells_what_any_panel_shows(monkeypatch):
    monkeypatch.setattr("detguard.reports.plots._svg", lambda figure: figure)
    records = [{"stage": "first", "batch": batch, "normal": 1.0} for batch in range(2)]
    records += [{"stage": "second", "batch": batch, "normal": 1.0, "hard": 2.0} for batch in range(2)]
    (legend,) = training_plot(records).legends
    assert [text.get_text() for text in legend.get_texts()] == ["normal", "hard"]


def test_an_ap_has_its_error_unless_there_are_too_few_photos():
    assert with_error({"AP": 0.0, "AP_error": 0.0}) == ".000 ±.000"
    assert with_error({"AP": 0.4, "AP_error": None}) == ".400"


def test_a_class_has_one_colour_in_page_and_picture():
    photo = np.zeros((200, 200, 3), np.uint8)
    found = Detections(torch.tensor([[50.0, 50.0, 150.0, 150.0]]), torch.tensor([0.9]), torch.tensor([0]))
    red, green, blue = class_colour("person")
    assert draw_detections(photo, found, {0: "person"})[100, 50].tolist() == [red, green, blue]
    (box,) = panel("", photo, found.records({0: "person"})).boxes
    assert box.colour == f"rgb({red} {green} {blue})"
    assert class_colour("person") != class_colour("car")


def test_white_letters_can_be_read_on_the_colour_of_any_class():
    for name in ("person", "bicycle", "dog", "cat", "airplane", "truck", *map(str, range(300))):
        parts = [value / 255 for value in class_colour(name)]
        light = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        assert 1.05 / (0.05 + 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]) > 4.5, name


def test_severities_are_joined_in_their_order_and_models_beyond_the_colours_differ():
    def of(order):
        severities = {str(s): {"AP": 0.5 - s / 20} for s in order}
        return {"a": {"clean": {"AP": 0.5}, "corruptions": {"kinds": {"fog": {"AP": 0.3, "severities": severities}}}}}

    assert corruption_plot(of((3, 1, 5))) == corruption_plot(of((1, 3, 5)))
    looks = {(colour, marker) for colour, marker, _ in LOOKS}
    assert len(looks) == len(LOOKS) == 24
    (curve,) = of((1, 3))["a"]["corruptions"]["kinds"].values()
    models = {f"net {i}": {"corruptions": {"kinds": {"fog": curve}}} for i in range(7)}
    same = {f"net {i}": {"corruptions": {"kinds": {"fog": curve}}} for i in range(6)}
    assert corruption_plot(models).count('id="m') > corruption_plot(same).count('id="m')


def test_a_strip_of_a_photo_is_shown_at_least_a_pixel_wide():
    assert panel("strip", np.zeros((9200, 2, 3), np.uint8)).caption == "strip"


def test_what_is_labelled_is_shown_without_a_confidence_that_nobody_gave():
    labels = Detections(torch.tensor([[1.0, 2, 3, 4]]), torch.ones(1), torch.tensor([0]))
    (box,) = panel("", np.zeros((9, 9, 3), np.uint8), of_labels(labels, {0: "person"})).boxes
    assert box.label == "person"
