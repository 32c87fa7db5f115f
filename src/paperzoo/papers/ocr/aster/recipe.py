"""ASTER learns by text recognition's default recipe; here are its settings."""

from paperzoo.tasks.text_recognition import Config, TextRecognitionRecipe


class RECIPE(TextRecognitionRecipe):
    """The task's recipe; its search calls the network in parts."""

    engine_parts = ("features", "decoder.decoder.advance", "decoder_reversed.decoder.advance")


PRESETS = {
    "embedded": Config(
        model="aster_tiny",
        model_arguments={"width": 48},
        data="rendered_digits",
        words=1536,
        alphabet="digits",
        max_length=3,
        height=32,
        width=48,
        steps=270,
        batch_size=64,
        optimizer="adam",
        learning_rate=3e-3,
        schedule="step",  # attention stays flat for a third of the steps; a cosine would have decayed by then
        milestones=(0.8,),
        warmup_steps=30,
        clip=5.0,
        beam_size=5,
    ),
    # sec. 4.1: pictures of 64 x 256, 32 of MJSynth and 32 of SynthText in a batch, 94 characters, AdaDelta from scratch at 1.0, a tenth
    # after 0.6M and 0.8M of 1M batches, no augmentation, five beams. rho and the gradient's norm are of the released codes.
    "published": Config(
        model="aster",
        data="mjsynth+synthtext",
        equal=True,
        alphabet="symbols",
        max_length=25,
        height=64,
        width=256,
        steps=1_000_000,
        batch_size=64,
        optimizer="adadelta",
        learning_rate=1.0,
        rho=0.95,
        schedule="step",
        milestones=(0.6, 0.8),
        gamma=0.1,
        clip=1.0,
        beam_size=5,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]
