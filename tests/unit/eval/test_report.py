"""The report page: its numbers, its intervals, its pictures, and that it asks nobody for anything."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.browser import Browser, needs_chromium
from support.images import image_result
from support.lvis_reference import random_lvis
from support.scored_runs import CLASSES, make_run

from coordexp.cli.main import main
from coordexp.codec.records import read_jsonl
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.box_matching import BoxSet
from coordexp.eval.coco.annotations import read_dataset, read_results
from coordexp.eval.coco.evaluate import run_coco, run_lvis
from coordexp.eval.detection import Counts, match_boxes
from coordexp.eval.errors.tide import ErrorKind, tide_errors
from coordexp.eval.evaluate import evaluate_directory
from coordexp.eval.predictions.artifacts import SCORED
from coordexp.eval.predictions.image_result import ImageResult, Objects
from coordexp.eval.report.data import load_run
from coordexp.eval.report.headline import MEASURES
from coordexp.eval.report.intervals import bootstrap
from coordexp.eval.report.numbers import compute_numbers, confidence_curve, size_rows
from coordexp.eval.report.write import ReportOptions, write_report
from coordexp.files import write_json, write_jsonl
from coordexp.geometry import dequantize_boxes

COCO_FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "coco_val2014_100"
QUICK = ReportOptions(num_worst=4, num_best=2, num_resamples=20)


class Page(HTMLParser):
    """Elements of a page that matter to the tests."""

    VOID = ("meta", "img", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headline: dict[str, list[float]] = {}
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.elements.append((tag, values))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr" and "data-key" in values:
            self.headline[values["data-key"]] = []
        if tag == "td" and values.get("data-value"):
            list(self.headline.values())[-1].append(float(values["data-value"]))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def all(self, tag: str, css_class: str = "") -> list[dict[str, str | None]]:
        return [
            values
            for name, values in self.elements
            if name == tag and css_class in [*(values.get("class") or "").split(" "), ""]
        ]


def cards_of(page: Path) -> list[dict]:
    """What the page's gallery draws."""
    return gallery_of(page)["cards"]


def gallery_of(page: Path) -> dict:
    found = re.search(
        r'<script type="application/json" id="gallery-data">(.*?)</script>', page.read_text(), re.S
    )
    return json.loads(found[1])


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory) -> Path:
    """The page of both runs."""
    return write_report(runs, tmp_path_factory.mktemp("page") / "r.html", options=QUICK).path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def test_headline_numbers_are_those_of_evaluation(runs, compared, tmp_path):
    page = Page(compared.read_text())
    metrics = [evaluate_directory(shutil.copytree(run, tmp_path / run.name)) for run in runs]
    assert set(page.headline) == {measure.key for measure in MEASURES}
    for key, values in page.headline.items():
        assert values == pytest.approx([found[key] for found in metrics], abs=1e-12), key
    assert 0 < metrics[0]["AP"] < metrics[1]["AP"]


def test_the_page_holds_everything_and_fetches_nothing(compared):
    html = compared.read_text()
    page = Page(html)
    sources = [
        values[key]
        for _, values in page.elements
        for key in ("src", "href", "xlink:href", "action", "poster", "srcset")
        if key in values
    ]
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not page.all("link")
    assert not re.search(r"(?:https?:)?//[a-z]|@import|url\(", re.sub(r"data:[^\"]*", "", html))
    [policy] = [v["content"] for v in page.all("meta") if v.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "<b>" not in html  # what the model wrote is escaped


def test_a_missing_picture_has_a_placeholder_and_is_counted(runs, tmp_path):
    every = ReportOptions(num_worst=12, num_best=12, num_resamples=0)
    written = write_report(runs[:1], tmp_path / "r.html", options=every)
    page = Page((tmp_path / "r.html").read_text())
    assert written.num_missing == 1
    pictures = {card["title"]: card["src"] for card in cards_of(tmp_path / "r.html")}
    assert len(pictures) == written.num_pictures == 12
    assert [title for title, source in pictures.items() if source is None] == ["3.png"]
    assert next(v for _, v in page.elements if v.get("id") == "missing")["data-missing"] == "1"
    elsewhere = write_report(runs[:1], tmp_path / "s.html", image_root=tmp_path, options=every)
    assert elsewhere.num_missing == elsewhere.num_pictures


def test_every_box_is_drawn_under_its_role(runs, tmp_path):
    everything = ReportOptions(num_worst=12, num_best=12, num_resamples=0)
    write_report(runs[:1], tmp_path / "r.html", options=everything)
    numbers = compute_numbers(load_run(runs[0]))
    tp, fp, fn = np.sum([match.counts for match in numbers.matches], axis=0)
    gallery = gallery_of(tmp_path / "r.html")
    boxes = [box for card in gallery["cards"] for box in card["panels"][0]["boxes"]]
    drawn = Counter(gallery["roles"][box[0]] for box in boxes)
    assert drawn == {"gt": tp, "tp": tp, "fp": fp, "fn": fn}
    names = Counter(gallery["descs"][box[1]] for box in boxes if gallery["roles"][box[0]] in ("gt", "fn"))
    assert names == Counter(desc for image in numbers.images for desc in image.gt.descs)


def test_gallery_is_bounded_and_starts_with_the_worst(runs, tmp_path):
    written = write_report(runs[:1], tmp_path / "r.html", options=replace(QUICK, num_thumbnails=0))
    f1 = [card["values"]["f1"] for card in cards_of(tmp_path / "r.html")]
    assert len(f1) == written.num_pictures <= 6
    all_f1 = sorted(match.scores.f1 for match in compute_numbers(load_run(runs[0])).matches)
    assert f1[:4] == pytest.approx(all_f1[:4], abs=1e-6)
    assert f1[-1] == pytest.approx(all_f1[-1])


def random_image(rng: np.random.Generator, image_id: int, crowd: bool) -> ImageResult:
    def boxes(count):
        corner, side = rng.uniform(0, 40, (count, 2)), rng.uniform(5, 40, (count, 2))
        return [tuple(box) for box in np.hstack([corner, corner + side]).tolist()]

    def truths(count):
        return [(CLASSES[rng.integers(2)], box) for box in boxes(count)]

    pred = [
        (CLASSES[rng.integers(2)], box, float(rng.integers(1, 6)) / 5) for box in boxes(rng.integers(0, 9))
    ]
    gt = truths(rng.integers(0, 7))
    flags = [False] * len(gt) + [True] * crowd
    return image_result(image_id, 80, 80, gt + truths(int(crowd)), pred, crowd=flags)


@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_confidence_curve_equals_matching_anew_at_every_threshold(seed, crowd):
    rng = np.random.default_rng(seed)
    images = [random_image(rng, image_id, crowd) for image_id in range(6)]
    curve = confidence_curve(images)
    scores = sorted({score for image in images for score in image.pred.scores_N.tolist()}, reverse=True)
    assert curve.confidence.tolist() == scores
    for s, threshold in enumerate(scores):
        kept = []
        for image in images:
            rows = np.flatnonzero(image.pred.scores_N >= threshold).tolist()
            pred = Objects.of(
                [image.pred.descs[row] for row in rows], [image.pred.points[row] for row in rows]
            )
            kept.append(replace(image, pred=pred))
        expected = match_boxes(BoxSet.of(kept), (0.5,)).at(0.5).micro
        assert (curve.precision[s], curve.recall[s], curve.f1[s]) == pytest.approx(tuple(expected), abs=1e-12)


def test_sizes_sum_to_the_counts_and_follow_the_areas(runs):
    numbers = compute_numbers(load_run(runs[0]))
    rows = {row.name: row for row in size_rows(numbers)}
    total = numbers.evaluation.f1.at(0.5).counts
    assert sum(row.found for row in rows.values()) == total.tp
    assert sum(row.right for row in rows.values()) == total.tp
    assert sum(row.num_pred for row in rows.values()) == total.tp + total.fp
    sides = [box[2] - box[0] for image in numbers.images for box in image.gt.points]
    assert rows["small"].num_gt == sum(side < 32 for side in sides)
    assert rows["large"].num_gt == sum(side >= 96 for side in sides)


def test_class_table_has_the_counts_of_each_description(runs, tmp_path):
    write_report(runs[:1], tmp_path / "r.html", options=QUICK)
    html = (tmp_path / "r.html").read_text()
    per_class = compute_numbers(load_run(runs[0])).evaluation.f1.at(0.5).per_class
    assert "zebra" in per_class  # predicted, never annotated
    for desc, counts in per_class.items():
        row = html.split(f'data-class="{desc}"')[1].split("</tr>")[0]
        cells = [float(text) for text in re.findall(r'<td data-sort="([^"]*)"', row)]
        scores = Counts(*counts).scores
        assert cells[:4] == [counts.tp + counts.fn, counts.tp, counts.fp, counts.fn]
        assert cells[6] == pytest.approx(scores.f1)


def test_coco_files_of_any_detector(tmp_path):
    shutil.copy(COCO_FIXTURE / "instances_val2014_100.json", tmp_path / "coco_gt.json")
    shutil.copy(COCO_FIXTURE / "instances_val2014_fakebbox100_results.json", tmp_path / "coco_preds.json")
    written = write_report([tmp_path], tmp_path / "r.html", options=QUICK)
    page = Page((tmp_path / "r.html").read_text())
    expected = {"AP": 0.505, "AP50": 0.697, "AP75": 0.573, "AR": 0.595}
    assert {key: round(page.headline[key][0], 3) for key in expected} == expected
    assert written.num_missing == written.num_pictures == 100  # the fixture holds no pictures


def test_lvis_data_are_reported_by_the_rules_of_lvis(tmp_path):
    gt, preds = random_lvis(5, num_images=15)
    write_json(tmp_path / "coco_gt.json", gt)
    write_json(tmp_path / "coco_preds.json", preds)
    dataset = read_dataset(gt)
    results = read_results(preds, dataset)
    write_report([tmp_path], tmp_path / "r.html", options=QUICK)
    html = (tmp_path / "r.html").read_text()
    page = Page(html)
    assert page.headline["AP"] == [pytest.approx(run_lvis(dataset, results).metrics["AP"])]
    assert page.headline["AP"] != [pytest.approx(run_coco(dataset, results).metrics["AP"])]
    assert "Average precision is by the rules of LVIS." in html
    low, high = bootstrap([compute_numbers(load_run(tmp_path))], 20, 0).of_run[0]["AP"]
    assert low < page.headline["AP"][0] < high


def test_runs_of_other_images_or_objects_are_refused(runs, tmp_path):
    shorter = make_run(tmp_path / "short", seed=1, noise=0.1, num_images=11)
    with pytest.raises(RecordError, match=r"12 and 11 images; image_id 11 is in .*loose only"):
        write_report([runs[0], shorter], tmp_path / "r.html")
    moved = make_run(tmp_path / "moved", seed=1, noise=0.1)
    lines = [json.loads(text) for text in (moved / SCORED).read_text().splitlines()]
    changed = next(line for line in lines if line["gt"])
    changed["gt"][0]["points"][0] -= 1.0
    write_jsonl(moved / SCORED, lines)
    with pytest.raises(RecordError, match=rf"image_id {changed['image_id']} .*are not the same"):
        write_report([runs[0], moved], tmp_path / "r.html")
    with pytest.raises(RecordError, match="given twice"):
        write_report([runs[0], runs[0]], tmp_path / "r.html")
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_folder_of_neither_layout_says_what_makes_one(tmp_path):
    with pytest.raises(RecordError, match=r"coordexp score --run .*coordexp eval --format coco"):
        load_run(tmp_path)


def test_no_object_and_no_prediction_at_all(tmp_path):
    run = make_run(tmp_path / "empty", seed=0, noise=0.0, num_images=2)
    lines = [{**json.loads(text), "gt": [], "pred": []} for text in (run / SCORED).read_text().splitlines()]
    write_jsonl(run / SCORED, lines)
    written = write_report([run], tmp_path / "r.html", options=QUICK)
    page = Page((tmp_path / "r.html").read_text())
    assert written.num_pictures == 2
    assert page.headline["AP"] == []  # a dash: there is nothing to measure AP on
    assert page.headline["f1_at_50"] == [1.0]


def test_json_holds_the_numbers_of_the_page(runs, tmp_path):
    page, path = tmp_path / "r.html", tmp_path / "r.json"
    written = write_report(runs, page, options=QUICK, json_path=path)
    content = json.loads(path.read_text())
    for key, values in Page(page.read_text()).headline.items():
        assert [run["headline"][key]["value"] for run in content["runs"]] == values
        for run in content["runs"]:
            low, high = run["headline"][key]["interval"]
            assert low <= high
        assert content["runs"][1]["headline"][key]["difference"]["value"] == pytest.approx(
            values[1] - values[0]
        )
    for folder, run in zip(runs, content["runs"], strict=True):
        numbers = compute_numbers(load_run(folder))
        counts = numbers.evaluation.f1.at(0.5).per_class
        assert {
            row["name"]: (row["tp"], row["fp"], row["fn"]) for row in run["classes"] if row["tp"] is not None
        } == (counts)
        assert run["tide"]["errors"]["Missed"]["num"] == tide_errors(numbers.images).count[ErrorKind.MISSED]
        assert sum(cell["num"] for cell in run["confusion"]["cells"] if cell["annotated"] is not None) == sum(
            len(image.gt) for image in numbers.images
        )
    assert len(content["label_errors"]) == written.num_label_errors > 0


def test_compare_prints_paired_differences(runs, tmp_path, capsys):
    argv = ["compare", *map(str, runs), "--bootstrap", "50", "--json", str(tmp_path / "c.json")]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "c.json").read_text())
    found = content["runs"][1]["headline"]["f1_50_95"]
    assert f"{found['difference']['value']:+.3f}" in printed
    assert found["difference"]["leaves_zero_out"]
    assert found["value"] == compute_numbers(load_run(runs[1])).evaluation.f1.f1_50_95
    assert main(["compare", str(runs[0])]) == 2
    assert "two run folders or more" in capsys.readouterr().err


def test_numbers_of_errors_lead_to_their_images(runs, tmp_path):
    """A link's number is that of cards with its tag."""
    write_report(runs[:1], tmp_path / "r.html", options=QUICK, json_path=tmp_path / "r.json")
    [run] = json.loads((tmp_path / "r.json").read_text())["runs"]
    gallery = gallery_of(tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    tag_of = {values["title"]: int(values["data-tag"]) for values in page.all("a") if "data-tag" in values}
    images = {
        words: [card["title"] for card in gallery["cards"] if tag in card["tags"]]
        for words, tag in tag_of.items()
    }
    zebras = [cell for cell in run["confusion"]["cells"] if cell["predicted"] == "zebra"]
    assert zebras
    for cell in zebras:
        words = f"{cell['annotated']} predicted as zebra"
        if cell["annotated"] is not None:
            assert sorted(images[words]) == sorted(f"{row}.png" for row in cell["images"])
    missed = run["tide"]["errors"]["Missed"]["images"]
    assert sorted(images["Missed errors"]) == sorted(f"{row}.png" for row in missed)


def test_label_errors_are_records_that_our_own_tools_read(runs, tmp_path):
    written = write_report(runs[:1], tmp_path / "r.html", options=QUICK)
    records = read_jsonl(written.label_errors, require_images=False)
    assert len(records) == written.num_label_errors > 0
    numbers = compute_numbers(load_run(runs[0]))
    by_name = {image.file_name: image for image in numbers.images}
    for record in records:
        [path] = record.image_paths()
        image = by_name[path.name]
        assert path.is_file() == (path.name != "3.png")
        [obj] = record.objects
        box = dequantize_boxes(obj.bins, image.width, image.height)
        assert box == pytest.approx(np.clip(record.metadata["box_xyxy"], 0, 319), abs=0.5)
        assert record.metadata["kind"] in ("unannotated", "not_found", "wrong_name")
        assert record.metadata["reason"]
    scores = [record.metadata["score"] for record in records]
    assert scores == sorted(scores, reverse=True)


def test_outlines_are_drawn_of_predictions_files_and_of_coco_files(tmp_path):
    run = make_run(tmp_path / "run", seed=1, noise=0.1, num_images=2)
    lines = [json.loads(text) for text in (run / SCORED).read_text().splitlines()]
    triangle = [10.0, 20.0, 170.0, 20.0, 170.0, 100.0]
    lines[0] |= {"gt": [{"type": "poly", "points": triangle, "desc": "cat"}], "pred": []}
    write_jsonl(run / SCORED, lines)
    write_report([run], tmp_path / "r.html", options=QUICK)
    card = next(card for card in cards_of(tmp_path / "r.html") if card["title"] == "0.png")
    [box] = card["panels"][0]["boxes"]
    assert box[8] == [[31, 62, 531, 62, 531, 312]]  # thousandths of 320 pixels
    shutil.copy(COCO_FIXTURE / "instances_val2014_100.json", tmp_path / "coco_gt.json")
    shutil.copy(COCO_FIXTURE / "instances_val2014_fakebbox100_results.json", tmp_path / "coco_preds.json")
    write_report([tmp_path], tmp_path / "s.html", options=QUICK)
    gallery = gallery_of(tmp_path / "s.html")
    boxes = [box for card in gallery["cards"] for box in card["panels"][0]["boxes"]]
    with_outline = Counter(gallery["roles"][box[0]] for box in boxes if len(box) == 9)
    assert with_outline["gt"] + with_outline["fn"] == sum(
        gallery["roles"][box[0]] in ("gt", "fn") for box in boxes
    )
    assert not with_outline["tp"]  # results without segmentation


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_at_both_widths(browser, compared, width):
    seen = browser.visit(f"file://{compared}", width=width)
    assert (seen.complaints, seen.outside, seen.overflow) == ([], [], 0)
    drawn = "document.querySelectorAll('#cards figure').length"
    assert browser.evaluate(drawn) == 12
    [chosen] = [tag for tag in gallery_of(compared)["tags"] if tag == "Missed errors of tight"]
    link = f"[...document.querySelectorAll('a[data-tag]')].find(a => a.title === {json.dumps(chosen)})"
    tag = gallery_of(compared)["tags"].index(chosen)
    browser.evaluate(f"{link}.click()")
    expected = sum(tag in card["tags"] for card in cards_of(compared))
    assert browser.evaluate(drawn) == expected < 12
    assert browser.evaluate("document.getElementById('all').textContent") == (
        f"{chosen}: {expected} of 12 images. Show all"
    )
    browser.evaluate("document.getElementById('all').click()")
    assert browser.evaluate(drawn) == 12
    browser.evaluate("document.getElementById('least').value = 4")
    browser.evaluate("document.getElementById('least').dispatchEvent(new Event('change'))")
    many = sum(card["values"]["objects"] >= 4 for card in cards_of(compared))
    assert browser.evaluate(drawn) == many > 0
    shown = browser.evaluate("document.querySelectorAll('#cards svg > g:not(.label)').length")
    boxes = [card["panels"] for card in cards_of(compared) if card["values"]["objects"] >= 4]
    assert shown == sum(len(panel["boxes"]) for panels in boxes for panel in panels)
