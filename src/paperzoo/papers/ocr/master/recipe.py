"""MASTER learns by text recognition's default recipe; here are its settings."""

from paperzoo.tasks.text_recognition import Config
from paperzoo.tasks.text_recognition import TextRecognitionRecipe as RECIPE

PRESETS = {
    "embedded": Config(
        model="master_tiny",
        data="rendered_digits",
        words=1536,
        alphabet="digits",
        max_length=3,
        height=32,
        width=48,
        steps=175,
        batch_size=64,
        optimizer="adam",
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=30,
        clip=5.0,
    ),
    # sec. 4.2 and the released configurations: 48 x 160, the shape kept and padded; MJSynth and SynthText (14.4M words) for 12 epochs in
    # batches of 512 over four GPUs; Adam at 4e-4. The authors' third set, SynthAdd, is added with "mjsynth+synthtext+synthadd".
    "published": Config(
        model="master",
        data="mjsynth+synthtext",
        alphabet="symbols",
        max_length=30,
        height=48,
        width=160,
        resize="pad",
        steps=337_500,
        batch_size=512,
        optimizer="adam",
        learning_rate=4e-4,
        schedule="constant",
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
