"""Text recognition: a picture of a word or line to what it says.

Tokens are numbered as in `paperzoo.blocks.sequence_decoding`: K characters from 0, then end, padding, unknown, start.

A batch is a dict:
    images   float32 (B, 3, H, W), normalised with `facts`; H is fixed, W is fixed or that of the widest; zero-padded on the right
    sizes    int64 (B, 2): height and width of each picture inside of it
    tokens   int64 (B, T): the text, an end token, padding
    lengths  int64 (B,): characters of each text, without the end
    texts    list of B strings, as they were written; index int64 (B,), their numbers in the data

A recogniser is a module with these members, whether it aligns (CTC), decodes step by step or all at once:
    model(images)                        raw outputs, a tensor or a tuple of tensors (B, …): what is exported
    model(images, targets)               the losses, a dict of scalars; targets is {"tokens", "lengths"}; their sum is learned from
    model.decode(outputs)                tokens int64 (B, T), the probability of each float32 (B, T), and the log-probability (B,) of
                                         the text; the first end or padding ends a text
    model.num_classes                    K
and where they make sense:
    model.search(images, beam_size)      as `decode`, by a search that raw outputs alone do not allow
    model.rectify(images)                the pictures as they are read (B, 3, h, w), and where control points lie, (B, N, 2), x and y
                                         from 0 to 1 of the width and height of `images`
    model.reset_classifier(num_classes)  to learn other characters
    model.uses_sizes = True              then it is called as model(images, sizes), model(images, sizes, targets),
                                         search(images, beam_size, sizes)
Its function takes `num_classes`, and `max_length`, the most characters of a text, if it has a use for it.

A prediction is a `Text`. Metrics are over the whole split, by the protocol that `Config.protocol` names:
    word_accuracy         share of texts read without a mistake. "alphanumeric": in small letters, digits and Latin letters alone, as
                          the benchmarks of scene text do it (IIIT5K, SVT, IC03, IC13, IC15, SVTP, CUTE80; IC15's 36 characters);
                          texts that have none of these are left out. "exact": as they are
    exact_accuracy        the same, of texts as they are written, whatever the protocol
    one_minus_ned         1 - mean of edit distance / length of the longer (ICDAR 2019's 1-N.E.D.)
    character_error_rate  edit distances of all texts / characters of all texts
    word_accuracy_lexicon each answer replaced by the nearest word of `Config.lexicon` first, if there is one
"""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from paperzoo.blocks.sequence_decoding import Alphabet, find_alphabet
from paperzoo.blocks.text_scores import WordScores
from paperzoo.data.images import to_image
from paperzoo.data.word_images import Chosen, WordImages, open_words, read_text
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe, running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError
from paperzoo.tasks.classification import IMAGENET, Count, Fraction, Positive
from paperzoo.tasks.training import learning_rate_factor, make_optimizer, parameter_groups

logger = logging.getLogger("paperzoo")
HALF = ([0.5] * 3, [0.5] * 3)


@dataclass(frozen=True)
class Text:
    """What one picture says, the probability of that, and each character with its own.

    Networks that straighten the picture first also say where their control points lie, in pixels of the picture.
    """

    text: str
    confidence: float
    characters: list[tuple[str, float]]
    control_points: list[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Config:
    """The default recipe: gradient descent on the recogniser's losses."""

    model: str = "aster"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)  # more for the model's function
    data: str = "rendered_digits"  # several with "+"
    words: Count = 1024  # how many words to learn from: only for rendered ones
    equal: bool = False  # several sets are drawn from equally often
    alphabet: str = "lowercase"  # digits, lowercase, cased, symbols, data, or a file with one symbol a line
    max_length: Count = 25  # characters; longer texts are not learned from
    outside: Literal["skip", "drop", "unknown", "refuse"] = "skip"  # texts with characters that the alphabet lacks
    height: Count = 32
    width: Count = 100
    resize: Literal["stretch", "pad", "batch"] = (
        "stretch"  # "pad" keeps the shape up to `width`; "batch" pads to the widest only
    )
    multiple: Count = 4  # of "batch": widths are rounded up to it
    normalise: Literal["half", "imagenet"] = "half"
    augment: Literal["none", "colour", "distort"] = "none"
    weights: str | None = None  # start from these; a head for other characters is replaced
    steps: Count = 100_000
    batch_size: Count = 64
    optimizer: Literal["adadelta", "adam", "adamw", "sgd", "rmsprop"] = "adadelta"
    learning_rate: Positive = 1.0
    rho: Fraction = 0.9  # of adadelta
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay_all: bool = True
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Fraction, ...] = (0.6, 0.8)
    gamma: Positive = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Positive | None = None
    ema_decay: Fraction | None = None
    beam_size: Count = 1  # of networks that can search; 1 is greedy
    protocol: Literal["alphanumeric", "exact"] = "alphanumeric"
    lexicon: str = "none"  # none; own: each sample's; full: all texts of the split; or a file with a word a line
    workers: Annotated[int, Field(ge=0)] = 0


# -- from pictures to batches ------------------------------------------------------------------------------------------


def augmentation(kind: str) -> nn.Module | None:
    """The random transforms of an augmentation's name, on uint8 (3, H, W)."""
    colour = [v2.ColorJitter(0.3, 0.3, 0.3, 0.05), v2.RandomApply([v2.GaussianBlur(3, (0.1, 1.0))], 0.2)]
    moved = [v2.RandomAffine(5, shear=(-8, 8, 0, 0)), v2.RandomPerspective(0.15, 0.5)]
    kinds = {"none": None, "colour": v2.Compose(colour), "distort": v2.Compose(colour + moved)}
    return kinds[kind]


def resized(image: Tensor, config: Any) -> Tensor:
    """A uint8 picture (3, H, W) at the height that the network wants, and at most its width."""
    width = config.width
    if config.resize != "stretch":
        width = min(width, max(1, math.ceil(image.shape[2] * config.height / image.shape[1])))
    if tuple(image.shape[1:]) == (config.height, width):
        return image
    return v2.functional.resize(image, [config.height, width], antialias=True)


class Prepared(Dataset):
    """A set of words as the network sees them, pixels still uint8."""

    def __init__(self, words: WordImages, config: Any, train: bool) -> None:
        self.words, self.config = words, config
        self.transform = augmentation(config.augment) if train else None

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict:
        item = self.words[index]
        image = item["image"] if self.transform is None else self.transform(item["image"])
        return {"image": resized(image, self.config), "text": item["text"], "index": index}


class Collate:
    """Samples of `Prepared` to a batch, as the module's docstring says."""

    def __init__(self, config: Any, facts: dict) -> None:
        self.config, self.facts = config, facts
        self.alphabet = Alphabet(facts["alphabet"], facts["separator"])

    def images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pictures uint8 (3, H, w) to a normalised, padded batch and their sizes."""
        mean, deviation = (torch.tensor(self.facts[key])[:, None, None] for key in ("mean", "deviation"))
        width = self.config.width
        if self.config.resize == "batch":
            widest, multiple = max(x.shape[2] for x in images), self.config.multiple
            width = -(-widest // multiple) * multiple
        if all(x.shape[2] == width for x in images):
            batch = (torch.stack(list(images)).float() / 255 - mean) / deviation
        else:
            batch = torch.zeros(len(images), 3, self.config.height, width)
            for i, image in enumerate(images):
                batch[i, :, :, : image.shape[2]] = (image.float() / 255 - mean) / deviation
        return batch, torch.tensor([x.shape[1:] for x in images])

    def __call__(self, samples: list[dict]) -> dict:
        images, sizes = self.images([s["image"] for s in samples])
        texts = [s["text"] for s in samples]
        readable = texts
        if self.config.outside == "drop":
            known = self.alphabet.numbers
            readable = [self.alphabet.separator.join(c for c in self.alphabet.split(t) if c in known) for t in texts]
        tokens, lengths = self.alphabet.encode(readable)
        batch = {"images": images, "sizes": sizes, "tokens": tokens, "lengths": lengths}
        return batch | {"texts": texts, "index": torch.tensor([s["index"] for s in samples])}


def learnable(words: WordImages, alphabet: Alphabet, max_length: int, outside: str, source: str) -> WordImages:
    """The samples that can be learned from: not empty, not too long, of characters that the alphabet has.

    What is left out is counted in a warning.

    Raises:
        DataError: if nothing is left; with `outside="refuse"` for the first text with a character that the alphabet lacks.
    """
    rows, reasons, strange = [], Counter(), Counter()
    for i in range(len(words)):
        text = words.text(i)
        parts, unknown = alphabet.split(text), alphabet.outside(text)
        strange.update(unknown)
        if unknown and outside == "refuse":
            raise DataError(
                words.path(i), f"its text {text!r} has {unknown[0]!r}, which the alphabet lacks; give another --alphabet, or --outside skip"
            )  # fmt: skip
        if unknown and outside == "drop":
            parts = [c for c in parts if c in alphabet.numbers]
        if not parts:
            reasons["empty"] += 1
        elif len(parts) > max_length:
            reasons[f"longer than {max_length}"] += 1
        elif unknown and outside == "skip":
            reasons["with other characters"] += 1
        else:
            rows.append(i)
    said = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
    if strange:
        said += f" (such as {' '.join(c for c, _ in strange.most_common(8))})"
    if not rows:
        raise DataError(source, f"none of its {len(words)} texts can be learned from: {said}")
    if reasons:
        logger.warning("%s: %d of %d texts are left out: %s", source, len(words) - len(rows), len(words), said)
    return Chosen(words, torch.tensor(rows)) if reasons else words


# -- the recipe --------------------------------------------------------------------------------------------------------


class TextRecognitionRecipe(Recipe):
    """The task's default recipe. A recogniser with another way to learn overrides `step` or `train_data`."""

    config: Config
    reads_images = True
    monitor = ("word_accuracy", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            alphabet = find_alphabet(config.alphabet, lambda: all_texts(self.open("train")))
            mean, deviation = HALF if config.normalise == "half" else IMAGENET
            self.facts = {
                "alphabet": alphabet.symbols, "separator": alphabet.separator, "mean": mean, "deviation": deviation,
            }  # fmt: skip
        self.alphabet = Alphabet(self.facts["alphabet"], self.facts["separator"])
        self.model = runtime.place(self.build())
        self.optimizer = self.make_optimizer()
        factor = lambda step: learning_rate_factor(config, step)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.average = running_average(self.model, config.ema_decay)
        self.collate = Collate(config, self.facts)

    def build(self) -> nn.Module:
        """The recogniser, for the alphabet's characters."""
        from paperzoo.catalog.cards import variants

        config, arguments = self.config, dict(self.config.model_arguments)
        if config.model in variants():
            function = getattr(variants()[config.model].module("model"), config.model)
            if "max_length" in inspect.signature(function).parameters:
                arguments.setdefault("max_length", config.max_length)
        if config.weights is None:
            return create(config.model, num_classes=len(self.alphabet), **arguments)
        model = create(config.model, weights=config.weights, **arguments)
        if model.num_classes != len(self.alphabet):
            model.reset_classifier(len(self.alphabet))
            model.paperzoo["arguments"]["num_classes"] = len(self.alphabet)
        return model

    def make_optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        if c.optimizer != "adadelta":
            return make_optimizer(c, self.model)
        return torch.optim.Adadelta(
            parameter_groups(self.model, c.weight_decay, c.decay_all), c.learning_rate, rho=c.rho
        )

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> WordImages:
        """The raw words of a split."""
        c = self.config
        width = c.width if c.resize == "stretch" else None
        count = c.words if split == "train" else max(1, min(256, c.words))
        return open_words(c.data, split, count, c.height, width, c.equal and split == "train")

    @cached_property
    def train_data(self) -> Dataset:
        c = self.config
        return Prepared(learnable(self.open("train"), self.alphabet, c.max_length, c.outside, c.data), c, train=True)

    @cached_property
    def test_data(self) -> Prepared:
        return Prepared(self.open("test"), self.config, train=False)

    @cached_property
    def batches(self):
        return self.runtime.batches(
            self.train_data, self.config.batch_size, workers=self.config.workers, collate=self.collate
        )

    def batch(self) -> dict:
        return self.batches.next()

    # -- learning ------------------------------------------------------------------------------------------------

    def inputs(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """What the network is called with."""
        return (images, sizes) if getattr(self.model, "uses_sizes", False) else (images,)

    def step(self, batch: dict) -> dict:
        self.model.train()
        targets = {"tokens": batch["tokens"], "lengths": batch["lengths"]}
        losses = self.model(*self.inputs(batch["images"], batch["sizes"]), targets)
        return {"loss": sum(losses.values())} | {f"{name}_loss": loss.detach() for name, loss in losses.items()}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The metrics of the module's docstring, over the whole split."""
        data = self.test_data if split == "test" else Prepared(self.open(split), self.config, train=False)
        scores, lexicon = WordScores(self.config.protocol, self.alphabet), self.lexicon(data.words)
        for batch in self.runtime.loader(data, min(self.config.batch_size * 2, 256), self.config.workers, self.collate):
            found = self.alphabet.decode(self.read(batch["images"], batch["sizes"])[0])
            own = None
            if lexicon is not None:
                own = [lexicon or data.words.lexicon(i) for i in batch["index"].tolist()]
            scores.update(found, batch["texts"], own)
        return scores.compute(self.runtime, lexicon is not None)

    def lexicon(self, words: WordImages) -> list[str] | None:
        """The words that an answer is compared with: None for none, an empty list for each sample's own.

        Raises:
            DataError: if a file has no words, or the data have no lexicons of their own.
        """
        name = self.config.lexicon
        if name == "none":
            return None
        if name == "full":
            return sorted(set(all_texts(words)))
        if name == "own":
            if not words.lexicon(0):
                raise DataError(
                    words.path(0), "the data have no lexicon of its own; give full, or a file with a word a line"
                )
            return []
        found = read_text(Path(name).expanduser()).split()
        if not found:
            raise DataError(name, "holds no words; a lexicon has one a line")
        return found

    # -- use -----------------------------------------------------------------------------------------------------

    def read(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of network inputs to tokens (B, T), their probabilities (B, T) and log-probabilities of the texts (B,)."""
        model, beam = self.deployed.eval(), self.config.beam_size
        images, *more = self.inputs(images, sizes)
        if beam > 1 and hasattr(model, "search"):
            return model.search(images, beam, *more)
        return model.decode(model(images, *more))

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[Text]:
        """Paths, PIL images or arrays (see `paperzoo.data.images.to_image`) to what they say."""
        results: list[Text] = []
        for start in range(0, len(inputs), 64):
            raw = [to_image(value) for value in inputs[start : start + 64]]
            images, sizes = self.collate.images([resized(image, self.config) for image in raw])
            images, sizes = images.to(self.runtime.device), sizes.to(self.runtime.device)
            tokens, each, total = (x.cpu() for x in self.read(images, sizes))
            points = [None] * len(raw)
            if hasattr(self.deployed, "rectify"):
                found = self.deployed.rectify(images)[1].cpu()
                points = [
                    place(found[i], images.shape[3], int(sizes[i, 1]), image.shape) for i, image in enumerate(raw)
                ]
            texts = self.alphabet.decode(tokens)
            for i, text in enumerate(texts):
                results.append(Text(text, float(total[i].exp()), self.characters(tokens[i], each[i]), points[i]))
        return results

    def characters(self, tokens: Tensor, probabilities: Tensor) -> list[tuple[str, float]]:
        """The characters of one text with their probabilities."""
        row, found = tokens.tolist(), []
        stop = next((t for t, i in enumerate(row) if i in (self.alphabet.end, self.alphabet.pad)), len(row))
        for i, probability in zip(row[:stop], probabilities.tolist(), strict=False):
            if i < len(self.alphabet):
                found.append((self.alphabet.symbols[i], probability))
        return found

    def samples(self, folder: Path) -> list[str]:
        """Eight held-out pictures, written as PNG files."""
        words, paths = self.test_data.words, []
        for i in range(0, len(words), max(1, len(words) // 8))[:8]:
            name = "".join(c if c.isalnum() else "_" for c in words.text(i))[:40]
            paths.append(str(folder / f"{i}_says_{name}.png"))
            Image.fromarray(words.image(i).permute(1, 2, 0).numpy()).save(paths[-1])
        return paths

    def example(self) -> tuple[Tensor, ...]:
        c = self.config
        images = torch.randn(2, 3, c.height, c.width, generator=torch.Generator().manual_seed(0))
        return self.inputs(images, torch.tensor([[c.height, c.width], [c.height, max(1, c.width * 3 // 4)]]))

    @torch.inference_mode()
    def draw(self, value: Any, result: Text, truth: str | None = None) -> Image.Image:
        """The picture with what it says; with its control points, and straightened, where the network does that."""
        image = to_image(value)
        factor = max(1, 200 // image.shape[2])
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BILINEAR)
        parts = [picture]
        if result.control_points is not None:
            pen = ImageDraw.Draw(picture)
            for x, y in result.control_points:
                x, y = (min(max(v * factor, 1), n - 2) for v, n in ((x, picture.width), (y, picture.height)))
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill="#e6194b", outline="white")
            images, _ = self.collate.images([resized(image, self.config)])
            straight = self.deployed.eval().rectify(images.to(self.runtime.device))[0][0].cpu()
            parts.append(self.picture(straight).resize(picture.size, Image.Resampling.BILINEAR))
        wrong = truth is not None and truth != result.text
        caption = f"{result.text or '(nothing)'}  {result.confidence:.0%}" + (f"   is {truth}" if wrong else "")
        return stacked(parts, caption, "#b00020" if wrong else "black")

    def picture(self, image: Tensor) -> Image.Image:
        """A normalised picture (3, h, w)."""
        mean, deviation = (torch.tensor(self.facts[k])[:, None, None] for k in ("mean", "deviation"))
        pixels = ((image * deviation + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def figures(self) -> dict[str, Image.Image]:
        """Held-out pictures that were read without and with mistakes."""
        from paperzoo.engine.pictures import tile

        words = self.test_data.words
        rows = range(0, len(words), max(1, len(words) // 64))[:64]
        images = [words.image(i) for i in rows]
        shown: dict[bool, list[Image.Image]] = {True: [], False: []}
        for i, image, result in zip(rows, images, self.predict(images), strict=True):
            text, truth = (
                WordScores(self.config.protocol, self.alphabet).comparable(t) for t in (result.text, words.text(i))
            )
            if len(shown[text == truth]) < 15:
                shown[text == truth].append(self.draw(image, result, words.text(i)))
        titles = {True: "Read without a mistake", False: "Read with a mistake"}
        return {titles[right]: tile(pictures, 5) for right, pictures in shown.items() if pictures}


def all_texts(words: WordImages) -> list[str]:
    return [words.text(i) for i in range(len(words))]


def place(points: Tensor, canvas: int, width: int, shape: torch.Size) -> list[tuple[float, float]]:
    """Control points (N, 2) from parts of a canvas to pixels of the picture (3, H, W) that fills `width` of it."""
    scale = torch.tensor([canvas / width * shape[2], shape[1]])
    return [(round(x, 2), round(y, 2)) for x, y in (points * scale).tolist()]


def stacked(parts: Sequence[Image.Image], caption: str, colour: str) -> Image.Image:
    """Pictures one below the other on white, with a line of text underneath."""
    font = ImageFont.load_default(14)
    width = max(*(p.width for p in parts), math.ceil(font.getlength(caption)) + 4)
    sheet = Image.new("RGB", (width, sum(p.height + 2 for p in parts) + 20), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height + 2
    ImageDraw.Draw(sheet).text((2, top), caption, fill=colour, font=font)
    return sheet
