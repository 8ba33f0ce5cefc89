"""Pictures of detections, contact sheets and curves: where the ink is, and which files appear."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from coordexp.errors import ContractError
from coordexp.eval.report.pictures import (
    ROLE_COLORS,
    AnswerPanel,
    Curve,
    LabeledBox,
    Role,
    compared,
    contact_sheet,
    draw_boxes,
    plot_curves,
    side_by_side,
)

GRAY = (128, 128, 128)


def _color(role: Role) -> tuple[int, ...]:
    return ImageColor.getrgb(ROLE_COLORS[role])


def _mask(picture: Image.Image, role: Role) -> np.ndarray:
    return (np.asarray(picture) == _color(role)).all(axis=-1)


def _panels(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Both panels (320 x 320 each) of a side-by-side picture of a 64 x 64 image."""
    assert picture.size == (648, 372)
    return picture.crop((0, 26, 320, 346)), picture.crop((328, 26, 648, 346))


def test_small_images_grow_by_a_whole_factor_without_blur():
    pixels = np.random.default_rng(0).integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
    picture = draw_boxes(Image.fromarray(pixels), [])
    np.testing.assert_array_equal(np.asarray(picture), pixels.repeat(5, axis=0).repeat(5, axis=1))


def test_large_images_shrink_to_the_limit():
    assert draw_boxes(Image.new("RGB", (2400, 1200)), []).size == (960, 480)
    assert draw_boxes(Image.new("RGB", (640, 480)), []).size == (640, 480)


def test_outline_runs_around_whole_pixels_including_the_last_one():
    """At 5x, image pixels 10..19 cover picture pixels 50..99."""
    picture = draw_boxes(Image.new("RGB", (64, 64), GRAY), [LabeledBox((10, 20, 19, 39), "", Role.GT)])
    rows, columns = np.nonzero(_mask(picture, Role.GT)[98:, :])  # below the (empty) label above the box
    assert (columns.min(), columns.max()) == (50, 99)
    assert rows.max() + 98 == 199
    assert tuple(np.asarray(picture)[150, 75]) == GRAY  # the inside stays free


def test_boxes_reaching_over_the_border_are_drawn_at_the_border():
    picture = draw_boxes(Image.new("RGB", (64, 64), GRAY), [LabeledBox((-30, -30, 90, 90), "x", Role.FP)])
    mask = _mask(picture, Role.FP)
    assert mask[160, 0]
    assert mask[160, 319]
    assert mask[319, 160]


def test_degenerate_and_swapped_boxes_are_drawn():
    for box in ((5, 5, 5, 5), (40, 40, 10, 10)):
        picture = draw_boxes(Image.new("RGB", (64, 64), GRAY), [LabeledBox(box, "a", Role.FP)])
        assert _mask(picture, Role.FP).any()


def test_roles_follow_the_match():
    """Prediction 1 matches ground truth 0; prediction 0 is a false positive, ground truth 1 is missed."""
    gt = [("red box", (2.0, 30.0, 20.0, 50.0)), ("blue box", (40.0, 30.0, 60.0, 50.0))]
    pred = [("zebra", (40.0, 5.0, 60.0, 20.0)), ("red box", (3.0, 29.0, 21.0, 49.0))]
    left, right = _panels(side_by_side(Image.new("RGB", (64, 64), GRAY), gt, pred, matched=[(1, 0)]))
    num = {
        (name, role): int(_mask(panel, role).sum())
        for name, panel in (("left", left), ("right", right))
        for role in Role
    }
    assert {key for key, count in num.items() if count} == {
        ("left", Role.GT),
        ("left", Role.FN),
        ("right", Role.TP),
        ("right", Role.FP),
    }
    assert _mask(left, Role.GT)[:, :160].sum() == num["left", Role.GT]  # the found object is the left one
    assert _mask(left, Role.FN)[:, 160:].sum() == num["left", Role.FN]
    assert _mask(right, Role.TP)[:, :160].sum() == num["right", Role.TP]


def test_an_object_is_missed_only_where_no_answer_found_it():
    gt = [("red box", (2.0, 30.0, 20.0, 50.0)), ("blue box", (40.0, 30.0, 60.0, 50.0))]
    answers = [AnswerPanel("mix", gt[:1], [(0, 0)]), AnswerPanel("ce", [], [])]
    picture = compared(Image.new("RGB", (64, 64), GRAY), gt, answers)
    assert picture.width == 3 * 320 + 2 * 8
    missed, right, wrong = (_mask(picture, role)[30:340] for role in (Role.FN, Role.TP, Role.FP))
    assert missed[:, 160:320].any()
    assert not missed[:, 328:].any()
    assert right[:, 328:648].any()
    assert not right[:, 656:].any()
    assert not wrong.any()


def test_empty_sides_show_the_bare_image():
    left, right = _panels(side_by_side(Image.new("RGB", (64, 64), GRAY), [], [], matched=[]))
    assert left.getcolors() == right.getcolors() == [(320 * 320, GRAY)]


def test_missed_objects_are_dashed_and_found_ones_solid():
    image, box = Image.new("RGB", (64, 64), GRAY), (10.0, 20.0, 50.0, 60.0)
    bottom_row = 304  # last row of a box that ends with image row 60
    solid = _mask(draw_boxes(image, [LabeledBox(box, "", Role.GT)]), Role.GT)[bottom_row, 50:255]
    dashed = _mask(draw_boxes(image, [LabeledBox(box, "", Role.FN)]), Role.FN)[bottom_row, 50:255]
    assert solid.all()
    assert 0.4 < dashed.mean() < 0.8


def test_labels_of_stacked_boxes_do_not_cover_each_other():
    boxes = [LabeledBox((20, 30, 40, 50), "first", Role.TP), LabeledBox((20, 30, 40, 50), "second", Role.FP)]
    picture = draw_boxes(Image.new("RGB", (64, 64), GRAY), boxes)
    fills = [np.flatnonzero(_mask(picture, role).sum(axis=1) > 20) for role in (Role.TP, Role.FP)]
    assert min(len(rows) for rows in fills) > 5
    above, below = ({int(r) for r in rows if r < 145 or r > 260} for rows in fills)
    assert above
    assert below
    assert not above & below


def test_colours_stay_apart_for_readers_with_red_green_blindness():
    """Deuteranopia and protanopia simulated with the matrices of Vienot et al. 1999 in linear RGB."""
    simulations = (
        [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
        [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    )
    linear = np.array([_color(role) for role in Role]) / 255.0
    linear = linear**2.2
    for matrix in simulations:
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(Role), k=1)]
        assert distances.min() > 0.12


def test_contact_sheet_places_pictures_row_by_row():
    pictures = [Image.new("RGB", (100, 50), color) for color in ("red", "lime", "blue")]
    sheet = contact_sheet(pictures, columns=2)
    assert sheet.size == (2 * 116, 2 * 66)
    centres = [sheet.getpixel(xy) for xy in ((58, 33), (174, 33), (58, 99), (174, 99))]
    assert centres == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_contact_sheet_needs_a_picture():
    with pytest.raises(ContractError, match="0 pictures in 2 columns"):
        contact_sheet([])


def _payload(mode: str, step: int, **metrics: float) -> dict:
    return {"schema_version": 1, "mode": mode, "global_step": step, "metrics": metrics}


def test_curves_are_written_for_the_keys_that_occur(tmp_path):
    payloads = [_payload("train", s, loss=10.0 / s) for s in (1, 2, 3)] + [_payload("eval", 3, eval_loss=4.0)]
    assert plot_curves(payloads, tmp_path / "out") == [tmp_path / "out" / "loss.png"]
    with Image.open(tmp_path / "out" / "loss.png") as picture:
        assert picture.format == "PNG"
        assert picture.width >= 800
    payloads.append(_payload("train", 4, **{"coord_diag/expected_bin_mae": 12.0}))
    assert [path.name for path in plot_curves(payloads, tmp_path / "out")] == ["loss.png", "coord_error.png"]
    assert plot_curves([], tmp_path / "none") == []


def test_curve_files_are_reproducible_and_depend_on_the_numbers(tmp_path):
    curve = Curve("c", "Title", "unit", ("a",))
    for name, value in (("one", 1.0), ("same", 1.0), ("two", 2.0)):
        payloads = [_payload("train", 0, a=5.0), _payload("train", 1, a=value)]
        plot_curves(payloads, tmp_path / name, curves=[curve])
    one, same, two = ((tmp_path / name / "c.png").read_bytes() for name in ("one", "same", "two"))
    assert one == same
    assert one != two
