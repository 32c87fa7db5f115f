"""Which task takes what."""

from __future__ import annotations

from typing import Any

from paperzoo.serve.inputs import Kind
from paperzoo.serve.limits import Limits
from paperzoo.serve.picture_inputs import AnyPair, Faces, People, Picture, PictureAndText, PicturePair, PictureWithHoles
from paperzoo.serve.table_inputs import Numbers, Row
from paperzoo.serve.video_inputs import ShortVideo
from paperzoo.serve.word_inputs import Asked, MaskedText, Named, Text, TextPair

KINDS: dict[str, type[Kind]] = {
    "paperzoo.tasks.face_verification": Faces,
    "paperzoo.tasks.optical_flow": PicturePair,
    "paperzoo.tasks.change_detection": PicturePair,
    "paperzoo.tasks.geometric_matching": AnyPair,
    "paperzoo.tasks.action_recognition": ShortVideo,
    "paperzoo.tasks.video_detection": ShortVideo,
    "paperzoo.tasks.inpainting": PictureWithHoles,
    "paperzoo.tasks.pose": People,
    "paperzoo.tasks.composed_retrieval": PictureAndText,
    "paperzoo.tasks.text_classification": Text,
    "paperzoo.tasks.translation": Text,
    "paperzoo.tasks.masked_language_modelling": MaskedText,
    "paperzoo.tasks.click_through_rate": Row,
    "paperzoo.tasks.control": Numbers,
    "paperzoo.tasks.operator_learning": Numbers,
    "paperzoo.tasks.generation": Asked,
    "paperzoo.tasks.restoration": Named,
}


def kind_for(recipe: Any, limits: Limits) -> Kind:
    """By the task that the recipe's class comes from; else pictures where it reads them, and arrays where not."""
    modules = [c.__module__ for c in type(recipe).__mro__]
    found = next((KINDS[m] for m in modules if m in KINDS), None)
    if found is Text and recipe.facts.get("pairs"):
        found = TextPair
    if found is None:
        found = Picture if recipe.reads_images else Numbers
    return found(recipe, limits)
