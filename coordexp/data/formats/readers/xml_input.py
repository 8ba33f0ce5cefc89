"""Reading XML of strangers: no entities, no files of theirs, and errors in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse

from coordexp.errors import RecordError
from coordexp.eval.coco.fields import parse_number, shown


def read_xml(path: Path) -> Element:
    """The root of an XML file; RecordError naming the file (and line) when it is none, or holds entities."""
    try:
        root: Any = parse(path).getroot()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}).") from error
    except DefusedXmlException as error:
        raise RecordError(f"{path}: defines entities, which no annotation file needs ({error})") from error
    except (ParseError, ValueError, LookupError) as error:
        raise RecordError(f"{path}: is not valid XML ({error})") from error
    if not isinstance(root, Element):
        raise RecordError(f"{path}: is empty, expected XML")
    return root


def text_of(element: Element, path: str) -> str:
    """The text of a child, without blanks around; "" where it is not there."""
    return (element.findtext(path) or "").strip()


def number_of(text: str | None, what: str, *, default: float | None = None) -> float:
    """A number of an attribute or element; `default` where there is none. RecordError naming `what` otherwise."""
    if (text is None or not text.strip()) and default is not None:
        return default
    value = parse_number(text) if text is not None else None
    if value is None:
        raise RecordError(f"{what} is {shown(text)}: expected a number")
    return value


def size_of(text: str | None, what: str) -> int:
    """A whole number of pixels, 0 where there is none. RecordError naming `what` otherwise."""
    value = number_of(text, what, default=0.0)
    if not value.is_integer() or value < 0:
        raise RecordError(f"{what} is {shown(text)}: expected a whole number of pixels")
    return int(value)
