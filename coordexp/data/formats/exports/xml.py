"""Pascal VOC and CVAT for images: XML files beside the pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from coordexp.data.check.source import Source
from coordexp.data.formats.exports.folder import (
    boxes_in_picture,
    check_target,
    flat_names,
    objects_by_image,
    one_outline,
    place_picture,
    split_name,
)
from coordexp.files import atomic_folder, write_text


def export_voc(sources: Sequence[Source], output: Path, *, pictures: str = "link") -> Counter[str]:
    """Write the sources as the splits of one Pascal VOC folder; completely or not at all. Returns what was counted.

    Corners count from 1 and keep their fractions. Objects are boxes.
    """
    check_target(output, pictures)
    counts = Counter(images_written=0, objects_written=0)
    taken: set[str] = set()
    with atomic_folder(output) as folder:
        for source in sources:
            names = flat_names(source, taken)
            boxes = boxes_in_picture(source)
            for row, (name, objects) in enumerate(zip(names, objects_by_image(source), strict=True)):
                root = _voc_image(source, row, name)
                for m in objects:
                    x1, y1, x2, y2 = boxes[m].tolist()
                    _voc_object(
                        root,
                        source.dataset.category_names[source.dataset.category_M[m]],
                        x1 + 1,
                        y1 + 1,
                        x2,
                        y2,
                    )
                write_text(folder / "Annotations" / f"{Path(name).stem}.xml", _text(root), sync=False)
                place_picture(source.pictures[row], folder / "JPEGImages" / name, pictures)
                counts["images_written"] += 1
                counts["objects_written"] += len(objects)
            listing = "".join(f"{Path(name).stem}\n" for name in names)
            write_text(folder / "ImageSets" / "Main" / f"{split_name(source)}.txt", listing)
    return counts


def export_cvat(sources: Sequence[Source], output: Path, *, pictures: str = "link") -> Counter[str]:
    """Write the sources as the subsets of one `CVAT for images 1.1`; completely or not at all. Returns the counts.

    Objects of one outline are polygons, the others boxes.
    """
    check_target(output, pictures)
    counts = Counter(images_written=0, objects_written=0)
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    with atomic_folder(output) as folder:
        for source in sources:
            boxes = boxes_in_picture(source)
            for row, (name, objects) in enumerate(
                zip(flat_names(source), objects_by_image(source), strict=True)
            ):
                width, height = source.dataset.sizes_N2[row].tolist()
                image = SubElement(
                    root, "image", id=str(counts["images_written"]), name=name, subset=split_name(source),
                    width=str(width), height=str(height),
                )  # fmt: skip
                for m in objects:
                    _cvat_shape(image, source, m, boxes[m].tolist())
                place_picture(source.pictures[row], folder / "images" / split_name(source) / name, pictures)
                counts["images_written"] += 1
                counts["objects_written"] += len(objects)
        write_text(folder / "annotations.xml", _text(root))
    return counts


def _voc_image(source: Source, row: int, name: str) -> Element:
    root = Element("annotation")
    SubElement(root, "folder").text = "JPEGImages"
    SubElement(root, "filename").text = name
    size = SubElement(root, "size")
    for key, value in zip(
        ("width", "height", "depth"), (*source.dataset.sizes_N2[row].tolist(), 3), strict=True
    ):
        SubElement(size, key).text = str(value)
    SubElement(root, "segmented").text = "0"
    return root


def _voc_object(root: Element, name: str, *corners: float) -> None:
    element = SubElement(root, "object")
    SubElement(element, "name").text = name
    for key in ("truncated", "difficult"):
        SubElement(element, key).text = "0"
    box = SubElement(element, "bndbox")
    for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
        SubElement(box, key).text = f"{value:.2f}"


def _cvat_shape(image: Element, source: Source, m: int, box: Sequence[float]) -> None:
    label = source.dataset.category_names[source.dataset.category_M[m]]
    outline = one_outline(source, m)
    if outline is not None:
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in outline.tolist())
        SubElement(image, "polygon", label=label, occluded="0", points=points, z_order="0")
        return
    corners = {key: f"{value:.2f}" for key, value in zip(("xtl", "ytl", "xbr", "ybr"), box, strict=True)}
    SubElement(image, "box", {"label": label, "occluded": "0", **corners, "z_order": "0"})


def _text(root: Element) -> str:
    indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{tostring(root, encoding="unicode")}\n'
